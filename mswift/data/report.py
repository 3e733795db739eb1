"""What became of every row: kept, cut, or dropped and why, per source, with a file that names each dropped row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mswift.data.rows import Row

REPORT_NAME = "dropped_rows.txt"


@dataclass(slots=True)
class SourceCount:
    """Training rows of one source, counted; ``pieces`` of the ``split`` ones are among the ``kept``."""

    kept: int = 0
    truncated: int = 0
    too_long: int = 0
    nothing_to_train: int = 0
    refused: int = 0
    split: int = 0
    pieces: int = 0
    pieces_left_out: int = 0

    @property
    def dropped(self) -> int:
        return self.too_long + self.nothing_to_train + self.refused


@dataclass(slots=True)
class LengthReport:
    """Counts and places; lengths are in tokens, before cutting.

    Attributes:
        max_length: the limit, ``None`` = none. truncation: ``delete``, ``left``, ``right`` or ``split``.
        sources: counts by source name, in order of appearance (``truncated`` rows are among the ``kept``).
        shortest, longest: lengths over all rows that the template could encode; 0 where there are none.
        dropped: source, line and reason of each dropped row, and of each row that lost a piece.
    """

    max_length: int | None
    truncation: str
    sources: dict[str, SourceCount] = field(default_factory=dict)
    shortest: int = 0
    longest: int = 0
    dropped: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        return sum(count.kept for count in self.sources.values())

    @property
    def num_truncated(self) -> int:
        return sum(count.truncated for count in self.sources.values())

    @property
    def num_dropped(self) -> int:
        """Rows of which nothing is left."""
        return sum(count.dropped for count in self.sources.values())

    def kept(self, source: str, length: int) -> None:
        count = self._seen(source, length)
        count.kept += 1
        count.truncated += self.max_length is not None and length > self.max_length

    def kept_whole(self, origins: Sequence[Row], lengths: npt.NDArray[np.int64]) -> None:
        """Rows of which nothing was cut."""
        for source, number in Counter(row.source for row in origins).items():
            self.sources.setdefault(source, SourceCount()).kept += number
        if len(lengths):
            self.shortest = min(self.shortest or int(lengths[0]), int(lengths.min()))
            self.longest = max(self.longest, int(lengths.max()))

    def cut(self, source: str, line: int, length: int, kept: int, pieces: int) -> None:
        """A row that was cut into so many pieces, of which so many have something to train."""
        count = self._seen(source, length)
        count.kept += kept
        count.split += 1
        count.pieces += kept
        if kept < pieces:
            count.pieces_left_out += pieces - kept
            reason = f"{pieces - kept} of {pieces} pieces left out: cut from {length} tokens, they have no token with a weight"
            self.dropped.append((source, line, reason))

    def too_long(self, source: str, line: int, length: int) -> None:
        self._seen(source, length).too_long += 1
        self.dropped.append((source, line, f"too long: {length} tokens, max_length {self.max_length}"))

    def nothing_to_train(self, source: str, line: int, length: int) -> None:
        self._seen(source, length).nothing_to_train += 1
        cut = self.max_length is not None and length > self.max_length
        how = "into pieces" if self.truncation == "split" else self.truncation
        reason = f"cut {how} from {length} to {self.max_length} tokens, it has" if cut else "it has"
        self.dropped.append((source, line, f"nothing to train: {reason} no token with a weight"))

    def refused(self, source: str, line: int, reason: str) -> None:
        self.sources.setdefault(source, SourceCount()).refused += 1
        self.dropped.append((source, line, reason))

    def merge(self, other: LengthReport) -> None:
        """Adds what became of other rows."""
        for name, count in other.sources.items():
            mine = self.sources.get(name, SourceCount())
            self.sources[name] = SourceCount(*(a + b for a, b in zip(astuple(mine), astuple(count), strict=True)))
        self.shortest = min(self.shortest or other.shortest, other.shortest or self.shortest)
        self.longest = max(self.longest, other.longest)
        self.dropped += other.dropped

    def write(self, directory: str | Path) -> Path | None:
        """Writes ``dropped_rows.txt`` (``file:line``, a tab, the reason) into ``directory``; ``None`` where no row was dropped."""
        if not self.dropped:
            return None
        path = Path(directory) / REPORT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{source}:{line}\t{reason}\n" for source, line, reason in self.dropped), encoding="utf-8")
        return path

    def lines(self) -> list[str]:
        """One line a source for the user: ``a.jsonl: 380 rows kept (2 cut right), 26 dropped (20 too long, 6 refused)``."""
        return [f"{name}: {_counted(count, self.truncation)}" for name, count in self.sources.items()]

    def nothing_left(self, path: Path | None) -> str:
        """The error text for a data set of which no row is left."""
        at = f"; the row numbers are in {path}" if path is not None else ""
        if not self.dropped:
            return "there are no rows to encode; check --dataset"
        if all(count.dropped == count.too_long for count in self.sources.values()):
            return (
                f"all {self.num_dropped} rows exceed max_length {self.max_length} (shortest {self.shortest}, longest {self.longest} tokens); "
                f"raise --max_length to at least {self.shortest}, or cut with --truncation_strategy right or left{at}"
            )
        return f"no row is left to train on: {', '.join(self.lines())}; raise --max_length or check the rows{at}"

    def _seen(self, source: str, length: int) -> SourceCount:
        self.shortest = min(self.shortest or length, length)
        self.longest = max(self.longest, length)
        return self.sources.setdefault(source, SourceCount())


def _counted(count: SourceCount, truncation: str) -> str:
    text = f"{count.kept} rows kept"
    if count.truncated:
        text += f" ({count.truncated} cut {truncation})"
    if count.split:
        text += f" ({count.split} cut into {count.pieces})"
    if count.pieces_left_out:
        text += f", {count.pieces_left_out} pieces left out (nothing to train)"
    reasons = {"too long": count.too_long, "with nothing to train": count.nothing_to_train, "refused by the template": count.refused}
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.items() if number)
    return f"{text}, {count.dropped} dropped ({listed})" if count.dropped else text
