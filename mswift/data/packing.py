"""Which rows share a pack: a pure function of (lengths, seed, epoch), from the lengths alone.

Best fit decreasing, over counts of lengths rather than over rows: bins with the same space left are filled in one stroke, so that the work grows
with the number of different lengths. Which of the rows of one length goes where is drawn anew for every epoch; how many packs there are is not.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.errors import DataError

Integers: TypeAlias = npt.NDArray[np.int64]
Strategy: TypeAlias = Literal["binpack", "sequential"]
_Pattern: TypeAlias = tuple[tuple[int, int], ...]
"""What lies in a bin: (length, how many of it), longest first."""


@dataclass(frozen=True, slots=True)
class Packs:
    """Rows in packs.

    Attributes:
        rows: int64, positions in the data set, each once. bounds: int64 ``[packs + 1]``: pack i has ``rows[bounds[i] : bounds[i + 1]]``.
    """

    rows: Integers
    bounds: Integers

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def rows_of(self, pack: int) -> list[int]:
        return self.rows[self.bounds[pack] : self.bounds[pack + 1]].tolist()

    def sums(self, values: npt.NDArray[np.int64]) -> Integers:
        """The sum over each pack of a value of each row."""
        return np.add.reduceat(values[self.rows], self.bounds[:-1]) if len(self) else np.zeros(0, np.int64)


class PackIndex:
    """The packs of every epoch of a data set.

    Args:
        lengths: tokens of each row. capacity: tokens that a pack may have.
        groups: bounds of rows that must share a pack, int64 ``[groups + 1]``: group i is rows ``[groups[i], groups[i + 1])``; None: each row alone.
        seed: of the order of rows. shuffle: without it rows of one length are used in the order of the data set, in every epoch.
        strategy: ``binpack`` wastes least; ``sequential`` fills one pack after the other in the order of the epoch.
        folder: where the packs of an epoch are saved and found again; None: they are made anew.

    Raises:
        DataError: a row or a group is longer than a pack.
    """

    def __init__(
        self,
        lengths: Integers,
        capacity: int,
        *,
        groups: Integers | None = None,
        seed: int = 42,
        shuffle: bool = True,
        strategy: Strategy = "binpack",
        folder: Path | None = None,
    ) -> None:
        self.capacity, self.groups, self.seed, self.shuffle, self.strategy, self.folder = capacity, groups, seed, shuffle, strategy, folder
        self.lengths = lengths
        self._sizes = lengths if groups is None else np.add.reduceat(lengths, groups[:-1])
        longest = int(self._sizes.max(initial=0))
        if longest > capacity:
            what = "row" if groups is None else "group of rows that belong together"
            raise DataError(f"a {what} has {longest} tokens, a pack {capacity}; raise --packing_length or lower --max_length")
        self._bins: list[tuple[int, _Pattern]] | None = None
        self._known: tuple[int, Packs] | None = None

    def of_epoch(self, epoch: int) -> Packs:
        """The packs of an epoch, from 0; the same for the same lengths, seed and epoch, wherever and whenever it is asked for."""
        epoch = epoch if self.shuffle else 0
        if self._known is None or self._known[0] != epoch:
            packs = self._saved(epoch)
            if packs is None:
                packs = self._with_groups(self._pack(epoch))
                self._save(epoch, packs)
            self._known = (epoch, packs)
        return self._known[1]

    def waste(self, packs: Packs) -> float:
        """The share of all places in packs that is left empty, 0.0 to 1.0."""
        return 1.0 - float(self.lengths.sum()) / (len(packs) * self.capacity) if len(packs) else 0.0

    def fingerprint(self, epoch: int) -> str:
        """Of all that the packs of an epoch depend on."""
        digest = hashlib.sha256(repr((1, self.capacity, self.seed, self.shuffle, epoch, self.strategy)).encode())
        digest.update(np.ascontiguousarray(self.lengths, np.int64).data)
        if self.groups is not None:
            digest.update(np.ascontiguousarray(self.groups, np.int64).data)
        return digest.hexdigest()[:16]

    def _pack(self, epoch: int) -> Packs:
        count = len(self._sizes)
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(count) if self.shuffle else np.arange(count)
        if self.strategy == "sequential":
            return _in_order(order, self._sizes, self.capacity)
        if self._bins is None:
            self._bins = list(_fill(np.bincount(self._sizes), self.capacity))
        narrow = self._sizes.astype(np.uint16 if self.capacity < 2**16 else np.int64)[order]  # two bytes are sorted by counting
        return _deal(self._bins, order[np.argsort(narrow, kind="stable")], np.bincount(self._sizes, minlength=self.capacity + 1))

    def _with_groups(self, packs: Packs) -> Packs:
        if self.groups is None:
            return packs
        sizes = np.diff(self.groups)[packs.rows]
        ends = np.cumsum(sizes)
        rows = np.repeat(self.groups[:-1][packs.rows] - (ends - sizes), sizes) + np.arange(int(ends[-1]) if len(ends) else 0)
        return Packs(rows, np.concatenate(([0], ends))[packs.bounds])

    def _paths(self, folder: Path, epoch: int) -> tuple[Path, Path]:
        name = f"packing-{self.fingerprint(epoch)}"
        return folder / f"{name}.rows.npy", folder / f"{name}.bounds.npy"

    def _saved(self, epoch: int) -> Packs | None:
        if self.folder is None:
            return None
        rows, bounds = self._paths(self.folder, epoch)
        return Packs(np.load(rows, mmap_mode="r"), np.load(bounds, mmap_mode="r")) if rows.exists() and bounds.exists() else None

    def _save(self, epoch: int, packs: Packs) -> None:
        """Each file appears complete; a folder that cannot be written to is no reason to stop."""
        if self.folder is None or not os.access(self.folder, os.W_OK):
            return
        for path, array in zip(self._paths(self.folder, epoch), (packs.rows, packs.bounds)):
            handle, draft = tempfile.mkstemp(prefix=".packing-", suffix=".npy", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                np.save(file, array)
            os.replace(draft, path)


def _fill(counts: Integers, capacity: int) -> Iterator[tuple[int, _Pattern]]:
    """Best fit decreasing over ``counts[length]``: (how many bins, what lies in each)."""
    open_bins: dict[int, list[tuple[int, _Pattern]]] = {}
    spaces: list[int] = []  # the keys of open_bins, ascending

    def put(space: int, number: int, pattern: _Pattern) -> None:
        if space not in open_bins:
            bisect.insort(spaces, space)
            open_bins[space] = []
        open_bins[space].append((number, pattern))

    def take(length: int) -> tuple[int, int, _Pattern]:
        """The fullest bins that have room: (space, number, pattern)."""
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            return capacity, 2**62, ()
        space = spaces[at]
        number, pattern = open_bins[space].pop()
        if not open_bins[space]:
            del open_bins[space], spaces[at]
        return space, number, pattern

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            space, number, pattern = take(length)
            copies = min(space // length, left) if length else left
            used = min(number, left // copies)
            put(space - copies * length, used, (*pattern, (length, copies)))
            if number > used and pattern:
                put(space, number - used, pattern)
            left -= used * copies
    for groups in open_bins.values():
        yield from groups


def _deal(bins: list[tuple[int, _Pattern]], by_length: Integers, counts: Integers) -> Packs:
    """Rows, sorted by their length, into the bins: those of one length in their order."""
    cursor = np.concatenate(([0], np.cumsum(counts))).tolist()
    rows = np.empty(len(by_length), np.int64)
    sizes = np.repeat([sum(copies for _, copies in pattern) for _, pattern in bins], [number for number, _ in bins])
    start = 0
    for number, pattern in bins:
        size, offset = sum(copies for _, copies in pattern), 0
        block = rows[start : start + number * size].reshape(number, size)
        for length, copies in pattern:
            first = cursor[length]
            cursor[length] += number * copies
            block[:, offset : offset + copies] = by_length[first : first + number * copies].reshape(number, copies)
            offset += copies
        start += number * size
    return Packs(rows, np.concatenate(([0], np.cumsum(sizes))).astype(np.int64))


def _in_order(order: Integers, sizes: Integers, capacity: int) -> Packs:
    """One pack after the other; a row that does not fit begins the next one."""
    ends = np.cumsum(sizes[order])
    bounds, filled = [0], 0
    while bounds[-1] < len(order):
        bounds.append(int(np.searchsorted(ends, filled + capacity, side="right")))
        filled = int(ends[bounds[-1] - 1])
    return Packs(order, np.asarray(bounds, np.int64))
