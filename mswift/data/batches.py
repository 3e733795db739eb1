"""Micro batches as a pure function of the global step: what a resumed run sees is what the first run would have seen.

The order of an epoch depends on the seed and the epoch alone, and the micro batches of a step on this order alone; data-parallel ranks only
deal them out. A different number of ranks therefore trains on the same micro batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from mswift.data.dataset import EncodedDataset
from mswift.errors import DataError

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


class Batches:
    """Deals an encoded data set out in global batches.

    In a global batch the rows are sorted by length, longest first (so that too little memory shows in the first micro batch), and cut into
    micro batches; micro batch ``j`` goes to rank ``j % dp_size``. A rank that would have one less gets a filler: one row of padding with weights
    0. A short last global batch is kept unless ``drop_last``: a loss that is a sum over a global weight stays exact.

    Args:
        micro_batch_size, global_batch_size: in rows; the global one counts all ranks.
        seed, shuffle: order of each epoch; without ``shuffle`` that of the data set, as evaluation wants it.
        dp_rank, dp_size: this rank's place on the data-parallel axis.
        pad_token_id: fills the right end of ``input_ids``.
        pad_to_multiple: ``s`` is rounded up to a multiple of this (tensor-parallel size with sequence parallelism).

    Raises:
        DataError: an empty data set, a size below 1, a rank outside its axis, or ``drop_last`` that leaves no step.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
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
    ) -> None:
        sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size, "dp_size": dp_size, "pad_to_multiple": pad_to_multiple}
        for name, size in sizes.items():
            if size < 1:
                raise DataError(f"{name} is {size}, wanted at least 1")
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank is {dp_rank}, wanted 0 to {dp_size - 1}")
        if not len(dataset):
            raise DataError("the data set is empty; check --dataset and --max_length")
        if drop_last and len(dataset) < global_batch_size:
            raise DataError(
                f"the data set has {len(dataset)} rows, less than one global batch of {global_batch_size}; keep the last batch or lower it"
            )
        self.dataset = dataset
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.seed, self.shuffle = seed, shuffle
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.pad_token_id, self.pad_to_multiple = pad_token_id, pad_to_multiple
        self.steps_per_epoch = len(dataset) // global_batch_size if drop_last else -(-len(dataset) // global_batch_size)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def epoch_of(self, k: int) -> int:
        """The epoch, from 0, that step ``k`` belongs to."""
        return k // self.steps_per_epoch

    def rows_of(self, k: int) -> list[list[int]]:
        """Positions in the data set of all micro batches of step ``k``, on all ranks."""
        if k < 0:
            raise ValueError(f"step {k}, wanted at least 0")
        begin = k % self.steps_per_epoch * self.global_batch_size
        chosen = self._epoch_order(self.epoch_of(k))[begin : begin + self.global_batch_size]
        ordered = chosen[np.argsort(-self.dataset.lengths[chosen], kind="stable")].tolist()
        return [ordered[i : i + self.micro_batch_size] for i in range(0, len(ordered), self.micro_batch_size)]

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro batches of global step ``k``; every rank has the same number of them."""
        parts = self.rows_of(k)
        num_rounds = -(-len(parts) // self.dp_size)
        mine = range(self.dp_rank, num_rounds * self.dp_size, self.dp_size)
        return [self._micro_batch(j, parts[j] if j < len(parts) else []) for j in mine]

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        known = self._order
        if known is None or known[0] != epoch:
            size = len(self.dataset)
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(size) if self.shuffle else np.arange(size)
            self._order = known = (epoch, order)
        return known[1]

    def _micro_batch(self, index: int, rows: list[int]) -> MicroBatch:
        longest = max((int(self.dataset.lengths[row]) for row in rows), default=1)
        width = -(-longest // self.pad_to_multiple) * self.pad_to_multiple
        height = max(len(rows), 1)
        ids = np.full((height, width), self.pad_token_id, np.int64)
        labels = np.full((height, width), IGNORED_LABEL, np.int64)
        weights = np.zeros((height, width), np.float32)
        for i, row in enumerate(rows):
            row_ids, row_weights = self.dataset.arrays(row)
            length = len(row_ids)
            ids[i, :length] = row_ids
            weights[i, : length - 1] = row_weights[1:]
            labels[i, : length - 1] = np.where(row_weights[1:] != 0, row_ids[1:], IGNORED_LABEL)
        positions = torch.arange(width).expand(height, width).contiguous()
        num_tokens = int(self.dataset.lengths[rows].sum()) if rows else 0
        return MicroBatch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(weights), positions, index, num_tokens, rows)


def padding_share(micro_batches: Sequence[MicroBatch]) -> float:
    """The share of all places in these micro batches that is padding, 0.0 to 1.0."""
    places = sum(batch.input_ids.numel() for batch in micro_batches)
    return 1.0 - sum(batch.num_tokens for batch in micro_batches) / places if places else 0.0
