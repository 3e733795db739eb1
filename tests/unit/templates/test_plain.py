"""Plain text: the tokenizer's own tokens, an end, every token trained."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mswift.errors import DataError
from mswift.templates import Conversation, PlainText


def tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


def of(*contents: object) -> Conversation:
    return Conversation([{"role": "assistant", "content": content} for content in contents])


def test_every_token_is_trained_and_texts_end() -> None:
    rows = PlainText(tokenizer(bos=True)).encode_batch([of("a b"), of("c ", "a"), of([{"type": "image"}]), of("")])
    assert [row[0].input_ids for row in rows if isinstance(row, list)] == [[0, 3, 4, 1], [0, 5, 3, 1], [0, 1]]
    assert all(set(row[0].weights) == {1.0} for row in rows if isinstance(row, list))
    assert str(rows[2]) == "a message holds more than text, wanted plain text"
    assert PlainText(tokenizer(bos=False)).encode_batch([of("a b </s>")])[0][0].input_ids == [3, 4, 1], "an end is not written twice"  # type: ignore[index]
    assert PlainText(tokenizer(bos=False)).encode_batch([]) == []


def test_a_text_needs_an_end() -> None:
    endless = tokenizer(bos=False)
    endless.eos_token = None
    with pytest.raises(DataError, match=r"has no end token \(eos_token\), which texts have to end with$"):
        PlainText(endless)
    one, other = (PlainText(tokenizer(bos=bos)).identity() for bos in (True, False))
    assert one["tokenizer"] != other["tokenizer"]
    assert set(one) == {"tokenizer", "chat template"}
