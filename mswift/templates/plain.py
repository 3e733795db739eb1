"""Plain text as training rows: no template, no turns, every token trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mswift.errors import DataError
from mswift.templates.bulk import chunk_of
from mswift.templates.conversation import Conversation, Encoded, EncodedChunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PlainText:
    """What `ChatTemplate` is for conversations: the contents of a row's messages one after the other, with the tokenizer's own tokens around them.

    A text begins with what the tokenizer puts in front of one (a BOS token, or nothing) and ends with its EOS token, which tells texts apart.

    Raises:
        DataError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError(f"{tokenizer.name_or_path or 'the tokenizer'} has no end token (eos_token), which texts have to end with")

    def identity(self) -> dict[str, str]:
        """Digests of all that the tokens of a text depend on, by what a user would call it."""
        parts = {"tokenizer": self.tokenizer.backend_tokenizer.to_str(), "chat template": f"plain text that ends with {self.tokenizer.eos_token}"}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in parts.items()}

    def encode_chunks(self, batches: Iterable[Sequence[Conversation]]) -> Iterator[EncodedChunk]:
        """`encode_batch` of one batch after the other, as arrays."""
        return (chunk_of(self.encode_batch(batch)) for batch in batches)

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | DataError]:
        """One row for each; an error in its place where a message is no text."""
        texts = [_text_of(conversation) for conversation in conversations]
        good = [text for text in texts if isinstance(text, str)]
        ids = iter(self.tokenizer(good, return_attention_mask=False, verbose=False)["input_ids"] if good else [])
        return [text if isinstance(text, DataError) else [self._row(next(ids))] for text in texts]

    def _row(self, ids: list[int]) -> Encoded:
        end = self.tokenizer.eos_token_id
        whole = ids if ids[-1:] == [end] else [*ids, end]
        return Encoded(whole, [1.0] * len(whole))


def _text_of(conversation: Conversation) -> str | DataError:
    parts = [message.get("content") for message in conversation.messages]
    if not all(isinstance(part, str) for part in parts):
        return DataError("a message holds more than text, wanted plain text")
    return "".join(str(part) for part in parts)
