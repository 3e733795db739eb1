"""A conversation with a model: what was said, the commands of the prompt, and the loop between them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator as PythonGenerator
from collections.abc import Sequence

from mswift.errors import DataError
from mswift.rollout.console import Console
from mswift.rollout.generate import Generator
from mswift.rollout.prompts import PromptEncoder
from mswift.rollout.settings import GenerationSettings
from mswift.templates import Message

GREETING = """\
Write a message and press Enter. Commands:
  clear          forget the conversation
  reset-system   give a new system message; forgets the conversation too
  multi-line     messages of several lines, the last one ends with #; single-line goes back
  quit           leave (also exit, Ctrl-D)"""


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        encoder: messages -> prompt. seed: answer number n of a conversation is drawn with seed + n; None: different every time.

    Attributes:
        messages: the conversation, a system message of the user's own first.
    """

    def __init__(self, generator: Generator, encoder: PromptEncoder, settings: GenerationSettings, *, seed: int | None = None) -> None:
        self.generator, self.encoder, self.settings, self.seed = generator, encoder, settings, seed
        self.messages: list[Message] = []

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def set_system(self, text: str) -> None:
        """Begin anew with this system message; empty: with the one of ``--system`` or of the template.

        Raises:
            DataError: the chat template takes no system message; nothing is changed then.
        """
        messages: list[Message] = [{"role": "system", "content": text}] if text else []
        self.encoder.encode([*messages, {"role": "user", "content": "x"}])
        self.messages = messages

    def ask(self, text: str) -> PythonGenerator[str, None, None]:
        """The answer in pieces. What was given out becomes part of the conversation, also if the caller stops early.

        Raises:
            DataError: the conversation has become too long, or the template refuses it; `text` is then not part of it.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            number = sum(message["role"] == "user" for message in self.messages) - 1
            seeds: Sequence[int] | None = None if self.seed is None else [self.seed + number]
            prompt = self.encoder.encode(self.messages)
            for pieces in self.generator.stream([prompt], self.settings, seeds=seeds):
                piece = pieces[0].text if answer else self.encoder.prefix + pieces[0].text
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()


def converse(conversation: Conversation, console: Console, *, stream: bool = True) -> None:
    """Read messages and commands and answer them until the user leaves.

    Args:
        stream: show an answer while it is written; else when it is whole.
    """
    if console.is_terminal:
        console.note(GREETING + ("; Ctrl-C stops an answer" if console.can_interrupt else ""))
    multi_line = False
    while (text := _read_message(console, multi_line)) is not None:
        command = text.strip().lower()
        if command in ("quit", "exit"):
            return
        elif command == "clear":
            conversation.clear()
            console.note("(the conversation is forgotten)")
        elif command == "reset-system":
            _reset_system(conversation, console)
        elif command in ("multi-line", "single-line"):
            multi_line = command == "multi-line"
            console.note("(end a message with #)" if multi_line else "(a message is one line)")
        elif command:
            _answer(conversation, console, text, stream)


def _read_message(console: Console, multi_line: bool) -> str | None:
    """One line, or all up to one that ends with # (left out); a command is a line of its own. None at the end of the input."""
    if not multi_line:
        return console.read("<<< ")
    lines: list[str] = []
    while (line := console.read("<<<[M] " if not lines else "")) is not None:
        if line.rstrip().endswith("#"):
            return "\n".join([*lines, line.rstrip()[:-1]])
        if not lines and line.strip().lower() in ("quit", "exit", "clear", "reset-system", "single-line", "multi-line"):
            return line
        lines.append(line)
    return "\n".join(lines) if lines else None


def _reset_system(conversation: Conversation, console: Console) -> None:
    text = console.read("<<<[S] ")
    try:
        conversation.set_system((text or "").strip())
    except DataError as error:
        console.note(f"error: {error}")
    else:
        console.note("(a new conversation with this system message)" if text else "(a new conversation with the system message it began with)")


def _answer(conversation: Conversation, console: Console, text: str, stream: bool) -> None:
    shown = ""
    try:
        with contextlib.closing(conversation.ask(text)) as pieces:
            for piece in console.until_interrupt(pieces):
                shown += piece
                if stream:
                    console.write(piece)
    except DataError as error:
        console.note(f"error: {error}")
        return
    console.write("\n" if stream else f"{shown}\n")
    if console.interrupted:
        console.note("(stopped)")
