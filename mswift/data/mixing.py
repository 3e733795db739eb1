"""Which rows of which source an epoch has, and in which order: a pure function of (sizes, shares, seed, epoch), so there is nothing to resume.

Shares are met to the row in every epoch rather than on average. A source that gives an epoch fewer rows than it has goes on in the next epoch
where it stopped: it shows every row once before it shows one again.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.data.encoded import Ids, MemorySink, Weights
from mswift.data.rows import Row
from mswift.errors import DataError

Integers: TypeAlias = npt.NDArray[np.int64]
Stopping: TypeAlias = Literal["first_exhausted", "all_exhausted"]


def shares_of(weights: Sequence[float | None], interleave_prob: Sequence[float] | None) -> list[float] | None:
    """The share of each source, with the sum 1; None where nobody asked for shares.

    Args:
        weights: of the names (``a.jsonl@0.7``). interleave_prob: of the flag.

    Raises:
        DataError: only some have a weight, both were given, or a number is missing or not above 0.
    """
    given = [weight for weight in weights if weight is not None]
    if given and interleave_prob:
        raise DataError("--interleave_prob and weights in --dataset (@) were both given, wanted one of them")
    if given and len(given) < len(weights):
        raise DataError(f"{len(given)} of {len(weights)} entries of --dataset have a weight (@), wanted all or none")
    if interleave_prob and len(interleave_prob) != len(weights):
        raise DataError(f"--interleave_prob has {len(interleave_prob)} numbers for {len(weights)} entries of --dataset, wanted one for each")
    found = list(interleave_prob or given)
    if any(not 0 < share < float("inf") for share in found):
        raise DataError(f"--interleave_prob is {' '.join(f'{share:g}' for share in found)}, wanted numbers above 0")
    return [share / sum(found) for share in found] if found else None


def quotas(sizes: Sequence[int], shares: Sequence[float] | None, stopping: Stopping = "first_exhausted") -> list[int]:
    """Rows that each source gives to an epoch.

    Args:
        sizes: rows that a pass over each source has. shares: of `shares_of`; None takes every source whole.
        stopping: an epoch with shares ends when the first source is through, or goes on (repeating the others) until all are.

    Raises:
        DataError: a source is empty, or so small beside its share that the others get no row.
    """
    if min(sizes, default=0) < 1:
        raise DataError("the mixture is empty: a source has no row left; check --dataset and --max_length")
    if shares is None:
        return list(sizes)
    bounds = [size / share for size, share in zip(sizes, shares, strict=True)]
    total = math.floor(min(bounds) + 1e-9) if stopping == "first_exhausted" else math.ceil(max(bounds) - 1e-9)
    found = _rounded(shares, total)
    if min(found) < 1:
        starved = found.index(min(found))
        raise DataError(
            f"the mixture gives entry {starved + 1} of --dataset no row in an epoch of {total}: its share is {shares[starved]:.2%}; "
            "raise it, or take --stopping_strategy all_exhausted"
        )
    if stopping == "first_exhausted":
        return [min(quota, size) for quota, size in zip(found, sizes, strict=True)]
    return [max(quota, size) for quota, size in zip(found, sizes, strict=True)]


def _rounded(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers with the sum `total`, each less than one from its share of it."""
    floors = [int(share * total) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: (floors[i] - shares[i] * total, i))
    for i in by_rest[: total - sum(floors)]:
        floors[i] += 1
    return floors


@dataclass(frozen=True, slots=True)
class Mixture:
    """The rows of every epoch, as positions in the sources joined end to end.

    Args:
        sizes: rows of each source. quotas: how many of them an epoch has. seed, shuffle: of their order; without it each source in its own order,
            evenly spread where there are shares (`spread`), else one after the other.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    seed: int = 42
    shuffle: bool = True
    spread: bool = False

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.quotas)

    @property
    def is_plain(self) -> bool:
        """Whether every epoch has every row once."""
        return self.sizes == self.quotas

    def epoch(self, epoch: int) -> Integers:
        """int64 ``[rows_per_epoch]``, in the order of training."""
        if self.is_plain and not self.spread:
            size = self.rows_per_epoch
            return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(size) if self.shuffle else np.arange(size)
        firsts = itertools.accumulate(self.sizes, initial=0)
        parts = [first + self._taken(i, epoch) for i, first in zip(range(len(self.sizes)), firsts, strict=False)]
        joined = np.concatenate(parts)
        if self.shuffle:
            return joined[np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(joined))]
        if not self.spread:
            return joined
        times = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in self.quotas])
        return joined[np.argsort(times, kind="stable")]

    def _taken(self, source: int, epoch: int) -> Integers:
        """The rows of a source in an epoch: the next `quota` of its endless passes, each of which has its own order."""
        size, quota = self.sizes[source], self.quotas[source]
        begin, end = epoch * quota, (epoch + 1) * quota
        passes = [self._pass(source, number) for number in range(begin // size, -(-end // size))]
        offset = begin // size * size
        return np.concatenate(passes)[begin - offset : end - offset]

    def _pass(self, source: int, number: int) -> Integers:
        size = self.sizes[source]
        if not self.shuffle:
            return np.arange(size)
        return np.random.Generator(np.random.PCG64([self.seed, 1 + source, number])).permutation(size)


class EntryCounts(MemorySink):
    """Keeps encoded rows in memory, and counts the rows and tokens of each entry of ``--dataset``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.tokens = Counter[int](), Counter[int]()

    def add(self, ids: Ids, weights: Weights, lengths: Integers, origins: Sequence[Row]) -> None:
        super().add(ids, weights, lengths, origins)
        for row, length in zip(origins, lengths.tolist(), strict=True):
            self.rows[row.entry] += 1
            self.tokens[row.entry] += length


def table(names: Sequence[str], mixture: Mixture, tokens: Sequence[int]) -> list[str]:
    """The mixture as lines of a table: source, rows of it, rows in an epoch, tokens in an epoch, share of the tokens.

    Args:
        tokens: of each source, all of its rows.
    """
    per_epoch = [round(total * quota / size) for total, quota, size in zip(tokens, mixture.quotas, mixture.sizes, strict=True)]
    whole = sum(per_epoch) or 1
    lines = [("source", "rows", "in an epoch", "tokens", "share")]
    lines += [
        (name, f"{size:,}", f"{quota:,}", f"{count:,}", f"{count / whole:.1%}")
        for name, size, quota, count in zip(names, mixture.sizes, mixture.quotas, per_epoch, strict=True)
    ]
    if len(names) > 1:
        lines.append(("all", f"{sum(mixture.sizes):,}", f"{mixture.rows_per_epoch:,}", f"{whole:,}", "100.0%"))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
