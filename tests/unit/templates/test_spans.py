"""From characters to tokens, with tokenizers that hide spaces in their offsets or let a token reach over a boundary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from mswift.templates.spans import Tokens, common_prefix, find_end, find_start

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    out = tokenizer([text], add_special_tokens=False)
    return Tokens(out["input_ids"][0], out.encodings[0])


def start_of(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[int, bool, list[str]]:
    """Where the answer begins, whether that is clean, and the pieces of prompt that were tokenised again."""
    pieces: list[str] = []

    def piece_ids(piece: str) -> list[int]:
        pieces.append(piece)
        return tokenise(tokenizer, piece).ids

    text = prompt + answer
    return *find_start(tokenise(tokenizer, text), text, len(prompt), set(tokenizer.get_added_vocab().values()), piece_ids), pieces


def test_only_the_part_after_the_last_added_token_is_tokenised_again(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("smollm2")
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    start, clean, pieces = start_of(tokenizer, prompt, "Hello")
    assert (start, clean) == (len(tokenise(tokenizer, prompt).ids), True)
    assert pieces == ["<|im_start|>assistant\n"]
    assert start_of(tokenizer, "", "Hello") == (0, True, [])


@pytest.mark.parametrize("kind", ["byte_level", "split_byte_level", "metaspace"])
def test_a_token_that_reaches_over_the_end_of_the_prompt_is_noticed(make_tokenizer: MakeTokenizer, kind: str) -> None:
    tokenizer = make_tokenizer("smollm2", kind)
    start, clean, pieces = start_of(tokenizer, "assistant: ", "the answer")  # " the" is one token
    whole = tokenise(tokenizer, "assistant: the answer")
    assert not clean
    assert pieces == ["assistant: "]
    assert "".join(tokenizer.convert_ids_to_tokens(whole.ids[:start])).endswith(("Ġthe", "▁the"))
    assert start_of(tokenizer, "assistant:", " the answer")[:2] == (start - 1, True)


def test_an_end_takes_in_every_token_of_its_last_character(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("smollm2")
    text = "Hi 🙂<|im_end|>\n"
    tokens = tokenise(tokenizer, text)
    end = find_end(tokens, text.index("<"))
    assert tokenizer.decode(tokens.ids[:end]) == "Hi 🙂"
    assert tokenizer.decode(tokens.ids[: find_end(tokens, len(text) - 1)]) == "Hi 🙂<|im_end|>"
    assert find_end(tokens, len(text)) == len(tokens.ids)
    assert find_end(tokens, 0) == 0


def test_common_prefix() -> None:
    assert common_prefix("assistant\na", "assistant\nb") == "assistant\n"
    assert common_prefix("ab", "abc") == "ab"
    assert common_prefix("", "abc") == ""
