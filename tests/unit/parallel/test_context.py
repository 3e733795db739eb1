"""Chunks of context-parallel ranks: those of Megatron-LM, every one once, and equally dear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.batches import IGNORED_LABEL, MicroBatch
from mswift.errors import ConfigError, LayoutError
from mswift.parallel.context import chunks_of, order_of_gathered


@given(st.integers(1, 64))
def test_every_chunk_lies_on_one_rank_and_all_ranks_cost_the_same(size: int) -> None:
    held = [chunks_of(rank, size) for rank in range(size)]
    assert sorted(chunk for pair in held for chunk in pair) == list(range(2 * size))
    assert {sum(pair) for pair in held} == {2 * size - 1}
    gathered = [chunk for pair in held for chunk in pair]
    assert [gathered[place] for place in order_of_gathered(size)] == list(range(2 * size))
    with pytest.raises(LayoutError, match="does not exist"):
        chunks_of(size, size)


def batch(width: int, **changes: object) -> MicroBatch:
    ids = torch.arange(1, 2 * width + 1).view(2, width)
    positions = torch.arange(width).expand(2, width)
    return MicroBatch(ids, ids + 1, torch.ones(2, width), positions, 3, 2 * width, [4, 5], **changes)  # type: ignore[arg-type]


def test_a_share_is_the_first_and_the_last_chunk_not_yet_taken() -> None:
    whole = batch(12)
    wanted = {0: [0, 1, 10, 11], 1: [2, 3, 8, 9], 2: [4, 5, 6, 7]}
    for rank, columns in wanted.items():
        share = whole.share(rank, 3)
        assert torch.equal(share.input_ids, whole.input_ids[:, columns])
        assert torch.equal(share.labels, whole.labels[:, columns])
        assert share.position_ids[1].tolist() == columns


def test_a_share_is_padded_and_says_nothing_of_padding() -> None:
    shares = [batch(10).share(rank, 2, multiple=4) for rank in range(2)]
    assert [tuple(share.input_ids.shape) for share in shares] == [(2, 8), (2, 8)]
    assert sum(float(share.weights.sum()) for share in shares) == 20.0
    assert int(torch.cat([share.labels for share in shares], 1).eq(IGNORED_LABEL).sum()) == 12
    assert batch(10).share(0, 1, multiple=4).input_ids.shape == (2, 10)
    assert shares[0].rows == [4, 5]
    packed = batch(10, cu_seqlens=torch.tensor([0, 10], dtype=torch.int32))
    with pytest.raises(ConfigError, match="rows end to end"):
        packed.share(0, 2)
