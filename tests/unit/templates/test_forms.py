"""Conversations of a known form: the same ids and weights as by the general way, for every template, tokenizer and content."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mswift.errors import DataError
from mswift.templates import ChatTemplate, Conversation, Encoded, EncodedChunk
from mswift.templates.content_use import ContentUse
from mswift.templates.named import table
from tests.unit.templates.registry import plain_conversations, tokenizer_for, tool_conversations
from tests.unit.templates.test_chat import KINDS, ONE_ROW, MakeTokenizer, chat, conversations


def rows_of(chunk: EncodedChunk, count: int) -> list[list[Encoded] | str]:
    """What `encode_batch` gives, out of arrays."""
    made: list[Any] = [chunk.refused.get(number, []) for number in range(count)]
    ends = chunk.lengths.cumsum().tolist()
    for origin, length, end in zip(chunk.origins.tolist(), chunk.lengths.tolist(), ends, strict=True):
        made[origin] = [*made[origin], Encoded(chunk.ids[end - length : end].tolist(), chunk.weights[end - length : end].tolist())]
    return made


def check(template: ChatTemplate, given_: Sequence[Conversation | list[dict[str, str]]]) -> int:
    """Both ways give the same; how many conversations had a form."""
    asked = [Conversation.of(one) for one in given_]
    (chunk,) = template.encode_chunks([asked])
    expected = [str(made) if isinstance(made, DataError) else made for made in template.encode_batch(asked)]
    assert rows_of(chunk, len(asked)) == expected
    assert chunk.ids.dtype == "int32"
    assert chunk.weights.dtype == "float32"
    assert list(chunk.origins) == sorted(chunk.origins)
    return sum(template._forms.of(one) is not None for one in asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ONE_ROW)
def test_both_ways_give_the_same(make_tokenizer: MakeTokenizer, name: str, kind: str) -> None:
    template = ChatTemplate(make_tokenizer(name, kind))
    formed = 0

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(conversations(system=name != "gemma"), min_size=1, max_size=8))
    def holds(several: list[list[dict[str, str]]]) -> None:
        nonlocal formed
        formed += check(template, several)

    holds()
    assert (formed > 5) == (name != "llama2"), "llama2 looks into contents"


@pytest.mark.parametrize("name", list(table()))
def test_every_shipped_template(name: str) -> None:
    made = [*plain_conversations().values(), *tool_conversations().values(), Conversation(chat("x")), Conversation([])]
    for template in (ChatTemplate(tokenizer_for(name)), ChatTemplate(tokenizer_for(name), loss_scale="last_round")):
        formed = check(template, made)
        if name in ("chatml", "smollm2", "qwen2_5", "llama3", "phi4"):
            assert formed >= 7
        if name == "qwen3":
            assert formed >= 3
        if name in ("glm4_5", "alpaca", "gpt_oss"):
            assert formed == 0


def test_settings_of_a_run_are_those_of_its_forms(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("smollm2")
    rows = [chat("q", "a", "q", "b"), chat("one", "two"), [{"role": "system", "content": "own"}, *chat("x", "y")]]
    assert check(ChatTemplate(tokenizer, system="Be brief."), rows) == 3
    assert check(ChatTemplate(tokenizer, loss_scale="last_round"), rows) == 3
    assert check(ChatTemplate(tokenizer, loss_scale="all"), rows) == 0
    assert check(ChatTemplate(tokenizer, loss_scale="default+hermes"), rows) == 0
    asked = [[*chat("q", "a"), {"role": "user", "content": "x"}, {"role": "assistant", "content": "b", "loss": False}]]
    assert check(ChatTemplate(tokenizer), asked) == 0


def test_contents_that_would_move_an_added_token_go_the_general_way() -> None:
    """An added token that begins in a content and ends in the template's own; one that the template's own is the beginning of; one between words."""
    rows = [chat("x<", "y<"), chat("a", "b>x"), chat("<|im_end|>", "c"), chat("<|im_end|>\n", "<|im_start|>assistant\n"), chat("1", "2")]
    for further in (
        AddedToken("<<|im", special=True, normalized=False),
        AddedToken("<|im_end|>>", special=True, normalized=False),
        AddedToken("x<", special=True, normalized=False),
        AddedToken("assistant\n2", special=True, normalized=False),
    ):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=type(tokenizer_for("smollm2").backend_tokenizer).from_str(tokenizer_for("smollm2").backend_tokenizer.to_str()),
            eos_token="<|im_end|>",
            pad_token="</s>",
        )
        tokenizer.chat_template = tokenizer_for("smollm2").chat_template
        tokenizer.add_tokens([further])
        formed = check(ChatTemplate(tokenizer), rows)
        assert formed == (0 if further.content in ("<<|im", "<|im_end|>>", "x<") else len(rows)), further.content


def test_a_form_that_does_not_hold_for_a_row_is_left_for_it_alone(make_tokenizer: MakeTokenizer) -> None:
    template = ChatTemplate(make_tokenizer("qwen2_5", "split_byte_level"))
    rows = [chat("q", "a"), chat("q", "\n\nmerges with the prompt"), chat("q", "<|im_end|>"), chat("q", "b")]
    assert check(template, rows) == 4
    assert check(template, rows * 400) == 1600
    (chunk,) = template.encode_chunks([[Conversation.of(rows[0])]])
    trained = [token for token, weight in zip(chunk.ids.tolist(), chunk.weights.tolist(), strict=True) if weight]
    assert template.decode(trained) == "a<|im_end|>"


def test_a_form_that_is_wrong_is_noticed_at_its_first_row(
    make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A template that changes contents, of which it is believed that it does not."""
    monkeypatch.setattr(logging.getLogger("mswift"), "propagate", True)
    monkeypatch.setattr("mswift.templates.forms.content_use", lambda template: ContentUse())
    tokenizer = make_tokenizer("smollm2")
    text = tokenizer.chat_template.replace("+ message['content'] +", "+ message['content'] | upper +")
    assert text != tokenizer.chat_template
    template = ChatTemplate(tokenizer, chat_template=text)
    rows = [chat("q", "a", "q", "b"), chat("one", "two"), chat("ONE", "two"), chat("three", "four")]
    assert check(template, rows) == 4, "all of them have a form"
    warned = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert len(warned) == 2, "one a form"
    assert any("conversations of user, assistant do not fit their form" in text for text in warned)
    caplog.clear()
    assert check(template, [chat("five", "six")]) == 1
    assert not caplog.records
    assert check(pickle.loads(pickle.dumps(template)), rows[1:]) == 3


def test_a_form_that_is_right_is_compared_once(make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(make_tokenizer("smollm2"))
    general: list[int] = []
    original = ChatTemplate.encode_batch
    monkeypatch.setattr(ChatTemplate, "encode_batch", lambda self, given: general.append(len(given)) or original(self, given))
    rows = [Conversation(chat(f"question {i}", "a")) for i in range(5)]
    for _ in range(3):
        (chunk,) = template.encode_chunks([rows])
        assert len(chunk.lengths) == 5
    assert sum(general) == 1
