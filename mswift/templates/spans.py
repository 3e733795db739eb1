"""Character positions to token positions: where a trained range begins and ends among the tokens of a text.

Offsets of tokens are not enough for this. Byte-level tokenizers may report them without leading spaces (``trim_offsets``), and a token that
reaches over the end of the prompt must be noticed, so a beginning is checked against the tokens of the prompt itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text: its ids, and the `tokenizers.Encoding` that knows their characters."""

    ids: list[int]
    encoding: Any

    def chars(self, index: int) -> tuple[int, int]:
        """The characters ``[start, end)`` of token ``index``."""
        return self.encoding.token_to_chars(index) or (0, 0)

    def at(self, char: int) -> int:
        """The first token that covers a character, or the nearest character before it that any token covers; -1 if there is none."""
        for position in range(char, -1, -1):
            token: int | None = self.encoding.char_to_token(position)
            if token is not None:
                return token
        return -1


def common_prefix(first: str, second: str) -> str:
    """What two texts have in common from their beginning."""
    return first[: _first_difference(first, second)]


def find_start(tokens: Tokens, text: str, start: int, added_ids: Set[int], piece_ids: Callable[[str], list[int]]) -> tuple[int, bool]:
    """The first token of the range that begins at character ``start``, and whether the tokens before it are those of ``text[:start]``.

    Added tokens cut a text into parts that are tokenised apart, so only the part from the last added token before ``start`` has to be
    tokenised again; ``piece_ids`` does that.
    """
    anchor = tokens.at(start - 1) if start else -1
    if anchor < 0:
        return 0, True
    while anchor > 0 and tokens.ids[anchor] not in added_ids:
        anchor -= 1
    begin = tokens.chars(anchor)[0] if tokens.ids[anchor] in added_ids else 0
    prompt = piece_ids(text[begin:start])
    first = anchor + len(prompt)
    if tokens.ids[anchor:first] == prompt:
        return first, True
    first = anchor + _first_difference(tokens.ids[anchor:], prompt) + 1  # this token is not the prompt's, yet it begins in the prompt
    while first < len(tokens.ids) and tokens.chars(first)[0] < start:
        first += 1
    return first, False


def _first_difference(first: Sequence[object], second: Sequence[object]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def find_end(tokens: Tokens, end: int) -> int:
    """One past the last token that begins before character ``end``."""
    last = tokens.at(end - 1) + 1 if end else 0
    while last < len(tokens.ids) and tokens.chars(last)[0] < end:
        last += 1
    return last
