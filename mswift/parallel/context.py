"""How a sequence lies over context-parallel ranks: in two chunks on each, one from the front and one from the back, as Megatron-LM deals it.

With causal attention a token costs what stands before it, so that the first and the last chunk together cost as much as the two in the middle.
"""

from __future__ import annotations

from mswift.errors import LayoutError


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two of ``2 * size`` equal chunks that a rank holds, in their order in the sequence."""
    if not 0 <= rank < size:
        raise LayoutError(f"rank {rank} of {size} context-parallel ranks does not exist")
    return rank, 2 * size - 1 - rank


def order_of_gathered(size: int) -> list[int]:
    """For each chunk of the sequence its place among the chunks of all ranks, rank after rank."""
    gathered = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    return [gathered.index(chunk) for chunk in range(2 * size)]
