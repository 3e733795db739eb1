"""From whatever shape a row has to messages, with every fault named by file, line and field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mswift.data.columns import rename
from mswift.data.content import MEDIA, read_media
from mswift.data.faults import fail
from mswift.data.files import RawRow
from mswift.data.messages import DEFAULT_NAMES, ROLES, Message, MessageNames, Tool, check_calls, read_tools
from mswift.data.preferences import has_rejected, read_pair
from mswift.data.shapes import Shape, Want, read_verdict
from mswift.errors import DataError
from mswift.log import get_logger

__all__ = ["ROLES", "BadRows", "Message", "Recognised", "Row", "Tool", "Want", "normalise"]

logger = get_logger("mswift.data.rows")
_SHOWN = 3  # faults that are listed


@dataclass(frozen=True, slots=True)
class Row:
    """A normalised row.

    Args:
        messages: in the one form of `mswift.data.messages`; of two answers the chosen one. columns: all other columns, for rewards and results.
        source, line: its place. tools: OpenAI's schemas of the tools that it may call.
        rejected: the conversation with the rejected answer. label: whether the answer is wanted (KTO). media: ``images``, ``audios``, ``videos``.
        entry: number of the entry of ``--dataset``, from 0.
    """

    messages: list[Message]
    columns: dict[str, Any]
    source: str
    line: int
    tools: list[Tool] | None = None
    rejected: list[Message] | None = None
    label: bool | None = None
    media: dict[str, list[Any]] = field(default_factory=dict)
    entry: int = 0

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(slots=True)
class Recognised:
    """What was understood of a source: shapes with their counts, columns that were renamed, found, or kept as they are."""

    shapes: Counter[str] = field(default_factory=Counter)
    mapped: dict[str, str] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    kept: dict[str, None] = field(default_factory=dict)
    media: Counter[str] = field(default_factory=Counter)
    tools: int = 0
    num_read: int = 0

    def add(self, row: Row, shape: Shape, given: set[str]) -> None:
        self.shapes[shape.name] += 1
        self.mapped |= shape.mapped
        self.given |= given
        self.kept |= dict.fromkeys(row.columns)
        self.media.update(row.media)
        self.tools += row.tools is not None

    def line(self, source: str, *, bad: int = 0) -> str:
        """Such as ``a.jsonl: 400 rows of query/response; problem read as query; with tools in 12; kept: level``."""
        parts = [", ".join(f"{count} row{'s' * (count != 1)} of {name}" for name, count in self.shapes.most_common())]
        if self.mapped:
            parts.append(", ".join(f"{old} read as {new}" for old, new in self.mapped.items()))
        if self.tools:
            parts.append(f"with tools in {self.tools}")
        if self.media:
            parts.append(f"{', '.join(self.media)} kept, not shown to the model")
        if self.kept:
            parts.append(f"kept: {', '.join(list(self.kept)[:8])}{', ...' if len(self.kept) > 8 else ''}")
        if bad:
            parts.append(f"{bad} left out")
        return f"{source}: {'; '.join(parts)}"


def normalise(
    raw: RawRow,
    columns: Mapping[str, str] | None = None,
    *,
    want: Want = "answer",
    auto: bool = True,
    given: MessageNames = DEFAULT_NAMES,
    recognised: Recognised | None = None,
    entry: int = 0,
) -> Row:
    """Turns one raw row into messages.

    Shapes: ``messages`` (also ``conversations``, with ``from`` and ``value``); alpaca (``instruction``, ``input``, ``output``); ``query`` and
    ``response``, by the names of `mswift.data.columns` too. The last two also take ``history`` (a list of ``[question, answer]`` pairs), and
    ``system`` goes in front of a conversation that has none. ``tools`` and media are read; all other columns are kept.

    Args:
        columns: renames columns before the shape is looked at, old name to new; names that the row lacks are passed over.
        want: what the row is for. auto: whether other names of columns are understood.
        given: how the source names the parts of a message. recognised: takes note of what was understood.
        entry: number of the entry of ``--dataset`` that the row is of.

    Raises:
        DataError: with file, line, the field at fault and what was got.
    """
    data, found = rename(raw.data, columns or {})
    if want == "either":
        want = "preference" if has_rejected(data) else "answer"
    shape = Shape(raw, data, want, auto, given)
    tools = read_tools(raw, data.pop("tools", None))
    rejected = None
    if want == "preference":
        messages, rejected = read_pair(shape)
        check_calls(raw, "rejected", rejected, tools)
    else:
        messages = shape.conversation()
    check_calls(raw, "messages", messages, tools)
    if want in ("answer", "label") and not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "(none)"
        fail(raw, f"no assistant turn to train on, got the roles {roles}; add one or remove the row")
    label = read_verdict(raw, data) if want == "label" else None
    media = {name: read_media(raw, name, data.pop(name)) for name in [f"{kind}s" for kind in MEDIA] if data.get(name) not in (None, "", [])}
    row = Row(messages, data, raw.source, raw.line, tools, rejected, label, media, entry)
    if recognised is not None:
        recognised.add(row, shape, found)
    return row


def listed(faults: Sequence[str]) -> str:
    """The first few of them, on one line."""
    more = len(faults) - _SHOWN
    return " | ".join(faults[:_SHOWN]) + (f" | and {more} more" if more > 0 else "")


class BadRows:
    """Counts the rows that cannot be used, and decides whether there are too many.

    Args:
        strict: the first one is an error.
        max_share: more than this share of all rows is an error.
    """

    def __init__(self, *, strict: bool = False, max_share: float = 0.01) -> None:
        self.strict, self.max_share = strict, max_share
        self.errors: list[str] = []

    def add(self, error: DataError) -> None:
        if self.strict:
            raise error
        self.errors.append(str(error))

    def finish(self, total: int) -> None:
        """Raises `DataError` where too many of ``total`` rows are bad; warns where some are."""
        if not self.errors:
            return
        message = f"{len(self.errors)} of {total} rows cannot be used"
        if len(self.errors) > self.max_share * total:
            raise DataError(f"{message}, more than {self.max_share:.0%}: {listed(self.errors)}; mend them, or allow more with --max_bad_rows_ratio")
        logger.warning("%s and are left out: %s", message, listed(self.errors))
