"""What goes into a template and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message: TypeAlias = dict[str, Any]
"""``role``, ``content`` (a text or a list of blocks), and optionally ``tool_calls``, ``reasoning_content``, ``loss``, ``loss_scale``."""
Tool: TypeAlias = dict[str, Any]
"""A tool's schema as OpenAI writes it: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and what else the template is told.

    Args:
        messages: the turns. tools: schemas of the tools that the assistant may call.
        kwargs: further variables of the template, such as ``enable_thinking``; they win over the settings of the run.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Conversation | Sequence[Message]) -> Conversation:
        """Messages alone are a conversation without tools."""
        return given if isinstance(given, Conversation) else cls(given)

    def upto(self, end: int) -> Conversation:
        """The conversation before message number ``end``."""
        return Conversation(self.messages[:end], self.tools, self.kwargs)


@dataclass(slots=True)
class Encoded:
    """One training row: token ids, and for each token how much its prediction counts in the loss (0.0 = not trained)."""

    input_ids: list[int]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """What became of some conversations.

    Attributes:
        ids, weights: training rows end to end. lengths: of each. origins: for each the number of the conversation that it was made from.
        refused: number of the conversation -> why the template does not take it.
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]
    origins: npt.NDArray[np.int64]
    refused: dict[int, str]


class RowEncoder(Protocol):
    """What makes training rows of conversations: a chat template, or plain text."""

    tokenizer: PreTrainedTokenizerFast

    def identity(self) -> dict[str, str]:
        """Digests of all that the tokens of a row depend on, by what a user would call it."""

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | DataError]:
        """The rows of each, or what is wrong with it."""

    def encode_chunks(self, batches: Iterable[Sequence[Conversation]]) -> Iterator[EncodedChunk]:
        """`encode_batch` of one batch after the other, as arrays."""


def join_path(index: int, field_name: str = "") -> str:
    """How an error names a message, or a field of it."""
    return f"messages[{index}]{'.' if field_name else ''}{field_name}"
