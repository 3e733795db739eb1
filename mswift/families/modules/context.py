"""A sequence that is spread over context-parallel ranks (`mswift.parallel.context`): where its tokens stand, and the whole of it again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from mswift.parallel.context import chunks_of, order_of_gathered


class SharedSequence:
    """This rank's share of every sequence; a group of one rank holds all of it.

    Args:
        group: the context-parallel group; None: of one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size, self.rank = (1, 0) if group is None else (group.size(), group.rank())
        self.chunks = chunks_of(self.rank, self.size)

    def places(self, length: int, device: Any) -> Tensor:
        """int64 ``[length]``: for each token here its place in the sequence."""
        if self.size == 1:
            return torch.arange(length, device=device)
        half = torch.arange(length // 2, device=device)
        return torch.cat([chunk * (length // 2) + half for chunk in self.chunks])

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of a whole `x`, whose `dim` divides by twice the ranks."""
        if self.size == 1:
            return x
        chunks = x.chunk(2 * self.size, dim)
        return torch.cat([chunks[chunk] for chunk in self.chunks], dim)

    def whole(self, x: Tensor) -> Tensor:
        """`x` ``[s here, ...]`` of all ranks in the order of the sequence, ``[s, ...]``; its gradient is summed over the ranks. Collective."""
        if self.size == 1:
            return x
        gathered = gather_from_sequence_parallel_region(x.contiguous(), tensor_parallel_output_grad=True, group=self.group)
        chunks = gathered.chunk(2 * self.size, 0)
        return torch.cat([chunks[place] for place in order_of_gathered(self.size)], 0)
