"""The harness itself: results by rank, real collectives, a failing and a hanging rank."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_distributed


def _sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, int, float]:
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return rank, world_size, value.item()


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("broken on purpose")
    dist.barrier()


def _hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def test_results_come_back_by_rank() -> None:
    assert run_distributed(_sum_of_ranks, 3, 10) == [(0, 3, 33.0), (1, 3, 33.0), (2, 3, 33.0)]


def test_a_failing_rank_is_named_and_ends_the_world() -> None:
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1:(.|\n)*ValueError: broken on purpose") as caught:
        run_distributed(_fail_on_one, 2)
    assert caught.value.rank == 1
    assert time.monotonic() - begun < 30


def test_a_hanging_rank_fails_with_its_stack() -> None:
    with pytest.raises(RankError) as caught:
        run_distributed(_hang_on_one, 2, timeout=6.0)
    assert "_hang_on_one" in str(caught.value)
