"""Which row of which source comes at which step, for sources that are too large to be held: a pure function, on any number of ranks.

A source is dealt into lanes: as many as rows of it come in a step, each a stretch of its chunks in the order of the pass. A step takes the next
row of every lane, so a lane is read by one rank from one place on, and its next rows are shuffled in a window. How many ranks there are changes
who reads a lane and nothing else: position i of epoch e is the same row everywhere, so nothing but the step has to be remembered.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mswift.data.shards import ChunkReader, Item, Shards
from mswift.errors import DataError

_SCALE = 1 << 80


@dataclass(frozen=True, slots=True)
class Ticket:
    """A row that is due: number of its source, and its number in the endless passes over it."""

    source: int
    number: int


class StreamedSource:
    """The order of one source, and its reading.

    Args:
        shards: its parts, one after the other. quota: rows that an epoch takes. lanes: stretches that are read side by side.
        window: rows of a lane that are shuffled together. seed, number: of the order; `number` is that of the source.
    """

    def __init__(self, shards: Sequence[Shards], quota: int, *, lanes: int, window: int, seed: int, number: int, shuffle: bool = True) -> None:
        self.shards, self.quota, self.window, self.seed, self.number, self.shuffle = list(shards), quota, window, seed, number, shuffle
        self._sizes = np.concatenate([one.chunks.rows for one in shards])
        self._owners = np.concatenate([np.full(len(one.chunks.rows), i) for i, one in enumerate(shards)])
        self._firsts = np.cumsum([0, *(len(one.chunks.rows) for one in shards)])
        self.num_rows = int(self._sizes.sum())
        self.lanes = max(1, min(lanes, self.num_rows))
        self._pass: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
        self._windows: dict[int, list[tuple[tuple[int, int], list[tuple[Item, int]]]]] = {}
        self._readers: dict[tuple[int, int], ChunkReader] = {}

    def lane_of(self, number: int) -> int:
        return number % self.num_rows % self.lanes

    def item(self, number: int) -> tuple[Item, int]:
        """Row `number` of the endless passes, and which of the shards it is of.

        Raises:
            DataError: a file cannot be read.
        """
        turn, place = divmod(number, self.num_rows)
        index, lane = divmod(place, self.lanes)
        window, offset = divmod(index, self.window)
        return self._window(turn, lane, window)[offset]

    def _window(self, turn: int, lane: int, window: int) -> list[tuple[Item, int]]:
        """The rows of a window in their order; the last two of a lane are kept."""
        known = self._windows.setdefault(lane, [])
        for key, items in known:
            if key == (turn, window):
                return items
        base, rest = divmod(self.num_rows, self.lanes)
        begin = lane * base + min(lane, rest) + window * self.window
        end = min(begin + self.window, (lane + 1) * base + min(lane + 1, rest))
        items = self._read(turn, lane, begin, end)
        if self.shuffle:
            entropy = [self.seed, 1 + self.number, turn, lane, window]
            items = [items[i] for i in np.random.Generator(np.random.PCG64(entropy)).permutation(len(items)).tolist()]
        self._windows[lane] = [*known[-1:], ((turn, window), items)]
        return items

    def _read(self, turn: int, lane: int, begin: int, end: int) -> list[tuple[Item, int]]:
        """Rows ``[begin, end)`` of a pass."""
        order, ends = self._order(turn)
        items: list[tuple[Item, int]] = []
        while begin < end:
            at = int(np.searchsorted(ends, begin, side="right"))
            chunk = int(order[at])
            first = begin - int(ends[at] - self._sizes[chunk])
            count = min(end - begin, int(self._sizes[chunk]) - first)
            owner = int(self._owners[chunk])
            reader = self._readers.setdefault((lane, owner), ChunkReader(self.shards[owner]))
            items += [(item, owner) for item in reader.read(chunk - int(self._firsts[owner]), first, count)]
            begin += count
        return items

    def _order(self, turn: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The chunks of a pass in their order, and where each ends."""
        if self._pass is None or self._pass[0] != turn:
            count = len(self._sizes)
            order = np.random.Generator(np.random.PCG64([self.seed, 1 + self.number, turn])).permutation(count) if self.shuffle else np.arange(count)
            self._pass = (turn, order, np.cumsum(self._sizes[order]))
        return self._pass[1], self._pass[2]


class StreamPlan:
    """The rows of every step.

    Args:
        sources: their quotas make an epoch. in_turn: one source after the other, instead of all of them by their shares throughout.

    Raises:
        DataError: there is no row.
    """

    def __init__(self, sources: Sequence[StreamedSource], global_batch_size: int, *, in_turn: bool = False) -> None:
        self.sources, self.global_batch_size, self.in_turn = list(sources), global_batch_size, in_turn
        self.rows_per_epoch = sum(source.quota for source in sources)
        self._first_lanes = list(itertools.accumulate((source.lanes for source in sources), initial=0))
        if not self.rows_per_epoch:
            raise DataError("the mixture is empty; check --dataset")
        self.steps_per_epoch = -(-self.rows_per_epoch // global_batch_size)

    def tickets(self, k: int) -> list[Ticket]:
        """The rows of step `k`."""
        epoch, step = divmod(k, self.steps_per_epoch)
        begin, end = (self._taken(min((step + i) * self.global_batch_size, self.rows_per_epoch)) for i in (0, 1))
        return [
            Ticket(i, epoch * source.quota + number)
            for i, (source, first, last) in enumerate(zip(self.sources, begin, end, strict=True))
            for number in range(first, last)
        ]

    def dealt(self, k: int, micro_batch_size: int, dp_size: int) -> list[list[list[Ticket]]]:
        """The micro batches of each rank at step `k`, equally many. A lane is read by one rank, unless that one would have more than others."""
        tickets = self.tickets(k)
        rounds = -(-len(tickets) // (micro_batch_size * dp_size))
        room = [rounds * micro_batch_size] * dp_size
        if len(tickets) == self.global_batch_size and len(tickets) % dp_size == 0:
            room = [len(tickets) // dp_size] * dp_size
        ranks: list[list[Ticket]] = [[] for _ in range(dp_size)]
        homeless = []
        for ticket in tickets:
            home = self.lane(ticket) % dp_size
            if len(ranks[home]) < room[home]:
                ranks[home].append(ticket)
            else:
                homeless.append(ticket)
        for ticket in homeless:
            rank = max(range(dp_size), key=lambda rank: (room[rank] - len(ranks[rank]), -rank))
            ranks[rank].append(ticket)
        return [[rank[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(rounds)] for rank in ranks]

    def lane(self, ticket: Ticket) -> int:
        """The number of the lane that a row is of, over all sources."""
        return self._first_lanes[ticket.source] + self.sources[ticket.source].lane_of(ticket.number)

    def positions(self, k: int) -> list[int]:
        """Rows that were taken of each source before step `k`, over all epochs."""
        epoch, step = divmod(k, self.steps_per_epoch)
        taken = self._taken(min(step * self.global_batch_size, self.rows_per_epoch))
        return [epoch * source.quota + number for source, number in zip(self.sources, taken, strict=True)]

    def fingerprint(self) -> str:
        """Of everything that decides which row comes when."""
        digest = hashlib.sha256(repr((self.in_turn, self.global_batch_size)).encode())
        for source in self.sources:
            digest.update(repr((source.quota, source.lanes, source.window, source.seed, source.shuffle)).encode())
            for shards in source.shards:
                digest.update(shards.fingerprint().encode())
        return digest.hexdigest()

    def _taken(self, position: int) -> list[int]:
        """How many rows of each source are among the first `position` of an epoch; grows with it, and adds up to it.

        Row m of a source with n rows is due at time (2 m + 1) / 2 n of the epoch; those that are due at the same time come in the order of sources.
        """
        wanted = [source.quota for source in self.sources]
        if self.in_turn:
            starts = itertools.accumulate(wanted, initial=0)
            return [min(max(position - start, 0), quota) for start, quota in zip(starts, wanted, strict=False)]
        low, high = 0, _SCALE
        while low < high:  # the latest time at which not too many are due
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sum(_due(quota, middle) for quota in wanted) <= position else (low, middle - 1)
        taken = [_due(quota, low) for quota in wanted]
        left = position - sum(taken)
        for i, quota in enumerate(wanted):
            if left and _due(quota, low + 1) > taken[i]:
                taken[i] += 1
                left -= 1
        return taken


def _due(quota: int, time: int) -> int:
    return (2 * quota * time + _SCALE) // (2 * _SCALE)


def make_plan(
    sources: Sequence[Sequence[Shards]],
    wanted: Sequence[int],
    *,
    global_batch_size: int,
    buffer_size: int = 1000,
    seed: int = 42,
    shuffle: bool = True,
    by_share: bool = False,
) -> StreamPlan:
    """The plan of some sources.

    Args:
        wanted: rows of each that an epoch takes. buffer_size: rows that are held to be shuffled, over all ranks.
        shuffle: without it rows come in their order, one source after the other unless `by_share`.
    """
    total = sum(wanted)
    made = []
    for number, (shards, quota) in enumerate(zip(sources, wanted, strict=True)):
        lanes = max(1, round(global_batch_size * quota / total)) if shuffle else 1
        if not all(one.can_seek for one in shards):
            lanes = min(lanes, sum(len(one.chunks.rows) for one in shards))
        window = max(1, buffer_size * quota // total // lanes) if shuffle else max(1, min(buffer_size, 256))
        made.append(StreamedSource(shards, quota, lanes=lanes, window=window, seed=seed, number=number, shuffle=shuffle))
    return StreamPlan(made, global_batch_size, in_turn=not shuffle and not by_share)
