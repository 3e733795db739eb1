"""Micro batches as a pure function of the global step: what a resumed run sees is what the first run would have seen.

The order of an epoch depends on the seed and the epoch alone, and the micro batches of a step on this order alone; data-parallel ranks only
deal them out. A different number of ranks therefore trains on the same micro batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mswift.data.encoded import TokenRows
from mswift.data.mixing import Mixture
from mswift.data.packing import PackIndex
from mswift.errors import ConfigError, DataError
from mswift.parallel.context import chunks_of

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows side by side, padded on the right, or end to end. All tensors are ``[b, s]``, end to end ``[1, t]``.

    Attributes:
        input_ids: int64.
        labels: int64; ``labels[:, t]`` is the token after ``input_ids[:, t]``, -100 where its weight is 0.
        weights: float32; how much ``labels[:, t]`` counts, 0 on padding and at the last place of a row.
        position_ids: int64, from 0 in every row.
        index: number of this micro batch inside the global batch, over all data-parallel ranks.
        num_tokens: tokens that are not padding.
        rows: positions in the data set, one for each row; empty for a filler that keeps the ranks in step.
        cu_seqlens: int32 ``[rows + 1]`` on the CPU, where each row begins if they lie end to end (padding is a row of its own); None: side by side.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    position_ids: torch.Tensor
    index: int
    num_tokens: int
    rows: list[int]
    cu_seqlens: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in ("input_ids", "labels", "weights", "position_ids")}
        return replace(self, **tensors)

    def share(self, rank: int, size: int, multiple: int = 1) -> MicroBatch:
        """A context-parallel rank's columns of all tensors, in two chunks (`mswift.parallel.context`), after padding on the right.

        Args:
            multiple: of which the columns of a rank are one.

        Raises:
            ConfigError: rows lie end to end.
        """
        if size == 1:
            return self
        if self.cu_seqlens is not None:
            raise ConfigError(f"rows end to end (packing, padding_free) with context parallelism cp({size}) are not supported yet; use one of them")
        width = self.input_ids.shape[1]
        unit = size * math.lcm(2, multiple)
        padding = -width % unit
        fill = {"input_ids": 0, "labels": IGNORED_LABEL, "weights": 0.0, "position_ids": 0}

        def cut(tensor: torch.Tensor, value: float) -> torch.Tensor:
            chunks = torch.nn.functional.pad(tensor, (0, padding), value=value).chunk(2 * size, dim=1)
            return torch.cat([chunks[chunk] for chunk in chunks_of(rank, size)], dim=1)

        shares: dict[str, Any] = {name: cut(getattr(self, name), value) for name, value in fill.items()}
        return replace(self, **shares)


class StepSource(Protocol):
    """What a run takes its micro batches from."""

    global_batch_size: int
    steps_per_epoch: int

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro batches of global step ``k``; every rank has the same number of them."""


class Batches:
    """Deals an encoded data set out in global batches of rows, or of packs of rows.

    The rows of a global batch are sorted by what they cost, dearest first (so that too little memory shows in the first micro batch), and cut
    into micro batches: rows side by side of nearly one length together, rows end to end so that every micro batch costs about the same. In
    each round every rank gets one micro batch, the rank that has had least the dearest one. A rank that would have one less gets a filler: one
    row of padding with weights 0. A short last global batch is kept unless ``drop_last``: a loss that is a sum over a global weight stays exact.

    Args:
        micro_batch_size, global_batch_size: in rows, or in packs; the global one counts all ranks.
        seed, shuffle: order of each epoch; without ``shuffle`` that of the data set, as evaluation wants it.
        dp_rank, dp_size: this rank's place on the data-parallel axis.
        pad_token_id: fills the right end of ``input_ids``.
        pad_to_multiple: ``s`` is rounded up to a multiple of this (tensor-parallel size with sequence parallelism).
        padding_free: rows lie end to end. packs: which rows share a pack; they lie end to end.
        groups: bounds of rows that stay in one micro batch, such as the two of a preference pair, as `PackIndex` takes them; sizes then count groups.
            With `packs` they are those of the packs. None: each row alone.
        mixture: which rows an epoch has, and in which order (its own seed and shuffling); None: every row once.
        linear_cost: tokens at which a row's attention costs as much as all the rest.

    Raises:
        DataError: an empty data set, a size below 1, a rank outside its axis, or ``drop_last`` that leaves no step.
    """

    def __init__(
        self,
        dataset: TokenRows,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int = 42,
        shuffle: bool = True,
        dp_rank: int = 0,
        dp_size: int = 1,
        pad_token_id: int = 0,
        pad_to_multiple: int = 1,
        drop_last: bool = False,
        padding_free: bool = False,
        packs: PackIndex | None = None,
        groups: npt.NDArray[np.int64] | None = None,
        mixture: Mixture | None = None,
        linear_cost: int = 8192,
    ) -> None:
        sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size, "dp_size": dp_size, "pad_to_multiple": pad_to_multiple}
        for name, size in sizes.items():
            if size < 1:
                raise DataError(f"{name} is {size}, wanted at least 1")
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank is {dp_rank}, wanted 0 to {dp_size - 1}")
        if not len(dataset):
            raise DataError("the data set is empty; check --dataset and --max_length")
        if packs is not None and groups is not None and (packs.groups is None or not np.array_equal(packs.groups, groups)):
            raise ValueError("packs of other groups than those of the batches")
        if mixture is not None and (packs is not None or groups is not None or sum(mixture.sizes) != len(dataset)):
            raise ValueError(f"a mixture of {sum(mixture.sizes)} rows for a data set of {len(dataset)}, or one of packs")
        self.dataset, self.packs, self.groups, self.mixture = dataset, packs, groups, mixture
        rows = len(dataset) if groups is None else len(groups) - 1
        self.num_units = rows if packs is None else len(packs.of_epoch(0))
        self.num_units = self.num_units if mixture is None else mixture.rows_per_epoch
        self.end_to_end = padding_free or packs is not None
        if drop_last and self.num_units < global_batch_size:
            what = "rows" if packs is None else "packs"
            raise DataError(
                f"the data set has {self.num_units} {what}, less than one global batch of {global_batch_size}; keep the last batch or lower it"
            )
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.seed, self.shuffle, self.linear_cost = seed, shuffle, linear_cost
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.pad_token_id, self.pad_to_multiple = pad_token_id, pad_to_multiple
        self.steps_per_epoch = self.num_units // global_batch_size if drop_last else -(-self.num_units // global_batch_size)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def epoch_of(self, k: int) -> int:
        """The epoch, from 0, that step ``k`` belongs to."""
        return k // self.steps_per_epoch

    def rows_of(self, k: int) -> list[list[int]]:
        """Positions in the data set of all micro batches of step ``k``, on all ranks."""
        if k < 0:
            raise ValueError(f"step {k}, wanted at least 0")
        epoch, begin = self.epoch_of(k), k % self.steps_per_epoch * self.global_batch_size
        chosen = self._epoch_order(epoch)[begin : begin + self.global_batch_size].tolist()
        units = [self._unit(epoch, number) for number in chosen]
        dearest = sorted(units, key=self.cost, reverse=True)
        size = self.micro_batch_size
        if not self.end_to_end:
            return [list(chain.from_iterable(dearest[i : i + size])) for i in range(0, len(dearest), size)]
        number = -(-len(dearest) // size)
        turns = (dearest[i : i + number] for i in range(0, len(dearest), number))
        parts: list[list[int]] = [[] for _ in range(number)]
        for turn, dealt in enumerate(turns):  # there and back, so that what is dear meets what is cheap
            for part, unit in zip(parts if turn % 2 == 0 else reversed(parts), dealt, strict=False):
                part += unit
        return sorted(parts, key=self.cost, reverse=True)

    def _unit(self, epoch: int, number: int) -> list[int]:
        """The rows that are dealt out together: those of a pack or of a group, or one."""
        if self.packs is not None:
            return self.packs.of_epoch(epoch).rows_of(number)
        return [number] if self.groups is None else list(range(int(self.groups[number]), int(self.groups[number + 1])))

    def cost(self, rows: Sequence[int]) -> int:
        """What it takes to compute these rows end to end, in arbitrary units: attention grows with the square of each row's length."""
        lengths = self.dataset.lengths[rows]
        return int((lengths * (lengths + self.linear_cost)).sum())

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro batches of global step ``k``; every rank has the same number of them."""
        parts = self.rows_of(k)
        return [self._micro_batch(j, parts[j] if j < len(parts) else []) for j in self.dealt(parts)[self.dp_rank]]

    def dealt(self, parts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The numbers of the micro batches of each rank, equally many; those beyond `parts` are fillers."""
        loads, ranks = [0] * self.dp_size, list[list[int]]([[] for _ in range(self.dp_size)])
        for first in range(0, len(parts), self.dp_size):
            least = sorted(range(self.dp_size), key=loads.__getitem__)
            for number, rank in enumerate(least, start=first):
                ranks[rank].append(number)
                loads[rank] += self.cost(parts[number]) if number < len(parts) else 0
        return ranks

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        known = self._order
        if known is None or known[0] != epoch:
            size = self.num_units
            if self.mixture is not None:
                order = self.mixture.epoch(epoch)
            else:
                order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(size) if self.shuffle else np.arange(size)
            self._order = known = (epoch, order)
        return known[1]

    def _micro_batch(self, index: int, rows: list[int]) -> MicroBatch:
        return collate(self.dataset, rows, index, pad_token_id=self.pad_token_id, pad_to_multiple=self.pad_to_multiple, end_to_end=self.end_to_end)


def collate(dataset: TokenRows, rows: list[int], index: int, *, pad_token_id: int, pad_to_multiple: int, end_to_end: bool) -> MicroBatch:
    """A micro batch of rows of a data set, side by side or end to end; of no rows: one row of padding."""
    lengths = dataset.lengths[rows].tolist() if rows else []
    num_tokens = sum(lengths)
    total = num_tokens if end_to_end else max(lengths, default=0)
    width = -(-max(total, 1) // pad_to_multiple) * pad_to_multiple
    height = 1 if end_to_end else max(len(rows), 1)
    ids = np.full((height, width), pad_token_id, np.int64)
    labels = np.full((height, width), IGNORED_LABEL, np.int64)
    weights = np.zeros((height, width), np.float32)
    bounds = [0]
    for i, row in enumerate(rows):
        line, start = (0, bounds[-1]) if end_to_end else (i, 0)
        row_ids, row_weights = dataset.arrays(row)
        end = start + len(row_ids)
        ids[line, start:end] = row_ids
        weights[line, start : end - 1] = row_weights[1:]
        labels[line, start : end - 1] = np.where(row_weights[1:] != 0, row_ids[1:], IGNORED_LABEL)
        bounds.append(end)
    tensors = (torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(weights))
    if not end_to_end:
        return MicroBatch(*tensors, torch.arange(width).expand(height, width).contiguous(), index, num_tokens, rows)
    if bounds[-1] < width:
        bounds.append(width)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    positions = torch.arange(width) - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff()).long()
    return MicroBatch(*tensors, positions[None], index, num_tokens, rows, cu_seqlens)


def padding_share(micro_batches: Sequence[MicroBatch]) -> float:
    """The share of all places in these micro batches that is padding, 0.0 to 1.0."""
    places = sum(batch.input_ids.numel() for batch in micro_batches)
    return 1.0 - sum(batch.num_tokens for batch in micro_batches) / places if places else 0.0
