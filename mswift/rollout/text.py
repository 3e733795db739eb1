"""The text of an answer as its tokens come: whole characters only, and never a part of a stop word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a tokenizer writes for bytes that are not a whole character (yet)


class AnswerText:
    """Turns tokens into text bit by bit; the pieces together are the text of the answer.

    A piece holds back bytes of an unfinished character and what may become a stop word. The answer ends before the stop word that is complete
    first. Special tokens are not shown.

    Args:
        tokenizer: of the checkpoint. stop_words: texts that end the answer.

    Attributes:
        text: what has been let out so far. stopped: a stop word was found.
    """

    def __init__(self, tokenizer: Any, stop_words: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_words = tokenizer, tuple(stop_words)
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        self._start = self._read = 0  # the window of tokens that is decoded, and the part of it that has been read
        self._held = ""

    def add(self, token: int) -> str:
        """Take the next token; returns the text that it lets out, perhaps none."""
        self._ids.append(token)
        return self._let_out(self._decode(last=False), last=False)

    def finish(self) -> str:
        """No token follows: returns what was held back. Half a character becomes U+FFFD."""
        return self._let_out(self._decode(last=True), last=True)

    def _decode(self, *, last: bool) -> str:
        """Text of the tokens since the last call. Decoded together with those before them, since a tokenizer may join words by neighbours."""
        before, after = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self._ids[self._start : self._read], self._ids[self._start :])
        )
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _let_out(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        # the one that ends first, whatever pieces the text comes in; of several that end together, the longest
        found = min(((text.find(word) + len(word), -len(word)) for word in self.stop_words if word in text), default=None)
        if found is not None:
            self.stopped = True
            text = text[: found[0] + found[1]]
        elif not last:
            held = max((_overlap(text, word) for word in self.stop_words), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` with which `word` begins."""
    return next((length for length in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:length])), 0)
