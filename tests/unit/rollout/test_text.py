"""Pieces of an answer: whole characters, no part of a stop word, and together the whole text, however it is cut into tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mswift.rollout.text import AnswerText

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"], exclude_characters="\ufffd") | st.sampled_from("  ab.\n早上好🐦é"), max_size=40)
FREE = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Letters:
    """A tokenizer whose tokens are code points, so that a test says where a text is cut."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def run(text: AnswerText, ids: list[int]) -> list[str]:
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return [*pieces, text.finish()]


@given(written=TEXTS)
@FREE
def test_pieces_are_whole_characters_and_add_up(tokenizer: Any, written: str) -> None:
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    text = AnswerText(tokenizer)
    pieces = run(text, ids)
    assert "".join(pieces) == text.text == written
    assert not any("\ufffd" in piece for piece in pieces)
    assert not text.stopped


def expected_with(written: str, words: list[str]) -> str:
    """What stands before the stop word that is complete first, found letter by letter."""
    for end in range(1, len(written) + 1):
        hits = [word for word in words if written[:end].endswith(word)]
        if hits:
            return written[: end - max(map(len, hits))]
    return written


@given(written=st.text("abc", max_size=25), words=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@FREE
def test_stop_words_end_the_text_and_no_part_of_one_is_let_out(written: str, words: list[str]) -> None:
    text = AnswerText(Letters(), words)
    pieces = run(text, [ord(letter) for letter in written])
    assert "".join(pieces) == text.text == expected_with(written, words)
    assert text.stopped == any(word in written for word in words)


@given(written=st.text("ab\n早🐦", max_size=25), words=st.lists(st.text("ab\n早🐦", min_size=1, max_size=4), max_size=3))
@FREE
def test_the_end_does_not_depend_on_how_the_text_is_cut_into_tokens(tokenizer: Any, written: str, words: list[str]) -> None:
    text = AnswerText(tokenizer, words)
    run(text, tokenizer(written, add_special_tokens=False)["input_ids"])
    assert text.text == expected_with(written, words)
    assert text.stopped == any(word in written for word in words)


def test_what_may_become_a_stop_word_waits() -> None:
    text = AnswerText(Letters(), ["STOP"])
    assert [text.add(ord(letter)) for letter in "a STalST"] == ["a", " ", "", "", "STa", "l", "", ""]
    assert text.finish() == "ST"
    assert text.text == "a STalST"


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Any) -> None:
    ids = tokenizer("好", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    text = AnswerText(tokenizer)
    assert [text.add(token) for token in ids[:2]] == ["", ""]
    assert set(text.finish()) == {"\ufffd"}


@pytest.mark.parametrize("special", ["<|im_start|>", "<pad>"])
def test_special_tokens_are_not_shown(tokenizer: Any, special: str) -> None:
    ids = tokenizer(f"who{special} are you", add_special_tokens=False)["input_ids"]
    text = AnswerText(tokenizer)
    assert "".join(run(text, ids)) == "who are you"
    assert tokenizer.convert_tokens_to_ids(special) in ids
