"""What a user types, line by line, and what the model is shown because of it."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mswift.errors import DataError
from mswift.rollout.console import Console
from mswift.rollout.conversation import Conversation, converse
from mswift.rollout.generate import Generator
from mswift.rollout.prompts import PromptEncoder
from mswift.rollout.sampling import Sampling
from mswift.rollout.settings import GenerationSettings
from mswift.templates.chat import ChatTemplate

SHORT = GenerationSettings(max_new_tokens=4)


@dataclass
class Talk:
    conversation: Conversation
    lines: list[str]
    notes: str

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.conversation.messages]


@pytest.fixture
def talk(generator: Generator, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Talk]:
    def run(typed: str, settings: GenerationSettings = SHORT, encoder: PromptEncoder = encoder, **options: Any) -> Talk:
        conversation = Conversation(generator, encoder, settings, seed=3)
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        converse(conversation, Console(), **options)
        captured = capsys.readouterr()
        return Talk(conversation, captured.out.splitlines(), captured.err)

    return run


def answer_to(generator: Generator, encoder: PromptEncoder, *messages: tuple[str, str], settings: GenerationSettings = SHORT) -> str:
    prompt = encoder.encode([{"role": role, "content": content} for role, content in messages])
    return generator.generate([prompt], settings, seeds=[3])[0].text


def test_a_conversation_of_several_turns(talk: Callable[..., Talk], generator: Generator, encoder: PromptEncoder) -> None:
    done = talk("who are you\n\n   \nwhat is two plus two\n")
    first = answer_to(generator, encoder, ("user", "who are you"))
    turns = [("user", "who are you"), ("assistant", first), ("user", "what is two plus two")]
    second = answer_to(generator, encoder, *turns)
    assert done.said == [*turns, ("assistant", second)]
    assert "\n".join(done.lines) == f"{first}\n{second}"
    assert done.notes == "", "through a pipe there is no greeting"
    assert talk("who are you\n\n   \nwhat is two plus two\n", stream=False).lines == done.lines


def test_clear_forgets_what_was_said(talk: Callable[..., Talk]) -> None:
    fresh = talk("what is two plus two\n")
    done = talk("who are you\n clear \nwhat is two plus two\nQUIT\nnever read\n")
    assert done.said == fresh.said
    assert done.lines[-len(fresh.lines) :] == fresh.lines
    assert "forgotten" in done.notes


def test_reset_system_begins_anew_with_another_system_message(talk: Callable[..., Talk], generator: Generator, encoder: PromptEncoder) -> None:
    done = talk("who are you\nreset-system\nof course it is four\nwho are you\nclear\ntell me\nexit\n")
    expected = answer_to(generator, encoder, ("system", "of course it is four"), ("user", "tell me"))
    assert done.said == [("system", "of course it is four"), ("user", "tell me"), ("assistant", expected)]
    assert "new conversation with this system message" in done.notes
    assert talk("reset-system\nx\nreset-system\n\ntell me\n").said[0] == ("user", "tell me")
    assert talk("reset-system\n").said == []


def test_messages_of_several_lines(talk: Callable[..., Talk]) -> None:
    done = talk("multi-line\nfirst\nsecond #\nsingle-line\nthird#\nmulti-line\nall\nthe rest")
    assert [content for role, content in done.said if role == "user"] == ["first\nsecond ", "third#", "all\nthe rest"]
    assert "end a message with #" in done.notes
    assert talk("multi-line\nclear\nquit\nno").said == []


def test_every_answer_begins_with_the_prefix(talk: Callable[..., Talk], encoder: PromptEncoder, generator: Generator) -> None:
    prefixed = PromptEncoder(encoder.template, "it is ")
    done = talk("who are you\n", encoder=prefixed)
    assert done.said[1][1] == "it is " + answer_to(generator, prefixed, ("user", "who are you"))
    assert "\n".join(done.lines) == done.said[1][1]
    assert len(prefixed.encode([{"role": "user", "content": "x"}])) > len(encoder.encode([{"role": "user", "content": "x"}]))


def test_seeds_go_on_from_turn_to_turn(talk: Callable[..., Talk]) -> None:
    hot = GenerationSettings(Sampling(temperature=2.0), max_new_tokens=6)
    done = talk("who\nclear\nwho\n", settings=hot)
    assert done.said == talk("who\n", settings=hot).said, "after clear a conversation is as a new one"
    assert talk("who\nwho\n", settings=hot).said[3] != done.said[1]


def test_a_conversation_that_is_too_long_says_so_and_goes_on(talk: Callable[..., Talk]) -> None:
    done = talk("who are you\n" + "a bird " * 400 + "\nwho are you\n")
    assert [role for role, _ in done.said] == ["user", "assistant", "user", "assistant"]
    assert done.notes.startswith("error: the prompt has ")
    assert "the longest sequence is 256" in done.notes


def test_a_template_without_system_messages_keeps_the_conversation(generator: Generator, tokenizer: Any) -> None:
    text = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    conversation = Conversation(generator, PromptEncoder(ChatTemplate(tokenizer, chat_template=text)), SHORT)
    said = "".join(conversation.ask("who"))
    with pytest.raises(DataError, match="no system here"):
        conversation.set_system("be brief")
    assert [message["content"] for message in conversation.messages] == ["who", said]


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
    generator: Generator, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pressing(Console):
        def write(self, text: str) -> None:
            super().write(text)
            if text.strip() and not pressed:
                pressed.append(text)
                os.kill(os.getpid(), signal.SIGINT)

    pressed: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    conversation = Conversation(generator, encoder, GenerationSettings(max_new_tokens=60))
    monkeypatch.setattr("sys.stdin", io.StringIO("who are you\nclear\nwho\n"))
    converse(conversation, Pressing())
    captured = capsys.readouterr()
    assert "(stopped)" in captured.err
    assert signal.getsignal(signal.SIGINT) is before
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert len(conversation.messages[1]["content"]) > len(pressed[0])


def test_what_was_shown_of_a_stopped_answer_is_part_of_the_conversation(generator: Generator, encoder: PromptEncoder) -> None:
    conversation = Conversation(generator, encoder, GenerationSettings(max_new_tokens=60))
    pieces = conversation.ask("who are you")
    shown = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages == [{"role": "user", "content": "who are you"}, {"role": "assistant", "content": shown}]


def test_a_second_ctrl_c_is_not_held_back() -> None:
    def press_twice() -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield 1

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(Console().until_interrupt(press_twice()))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_at_the_prompt_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            if self.tell() == 0 or typed:
                self.seek(1)
                typed[:] = typed[1:]
                raise KeyboardInterrupt
            return super().readline()

    typed = ["one press"]
    monkeypatch.setattr("sys.stdin", Interrupted("xhello\n"))
    assert Console().read("") == "hello", "one press is only answered with a note"
    assert "Ctrl-C again leaves" in capsys.readouterr().err
    typed[:] = ["a", "b"]
    monkeypatch.setattr("sys.stdin", Interrupted("xhello\n"))
    assert Console().read("") is None


def test_every_process_reads_what_the_main_one_reads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("mine\n"))
    other = Console(is_main=False, share=lambda line: "theirs" if line is None else line)
    assert other.read("") == "theirs"
    other.write("not shown")
    other.note("not shown")
    assert "".join(capsys.readouterr()) == ""
    assert not other.can_interrupt
    assert Console(share=lambda line: line).read("") == "mine"
