"""Micro batches: each row once an epoch on any number of ranks, labels that look one token ahead, padding that counts for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.data.batches import Batches, MicroBatch, padding_share
from mswift.data.encoded import EncodedDataset
from mswift.data.mixing import Mixture
from mswift.data.packing import PackIndex
from mswift.data.report import LengthReport
from mswift.data.rows import Row
from mswift.errors import DataError

sizes = st.integers(1, 5)


def make_dataset(lengths: Sequence[int]) -> EncodedDataset:
    """Row ``i`` has ids ``1000 * i + 1, ...`` and weights that tell the place."""
    encoded = [(1000 * i + 1 + np.arange(n, dtype=np.int32), (np.arange(n) % 3).astype(np.float32) / 2) for i, n in enumerate(lengths)]
    return EncodedDataset(encoded, [Row([], {}, "a.jsonl", i + 1) for i in range(len(lengths))], LengthReport(None, "delete"))


def make_batches(dataset: EncodedDataset, **kwargs: Any) -> Batches:
    return Batches(dataset, **{"micro_batch_size": 2, "global_batch_size": 4, **kwargs})


def all_ranks(dataset: EncodedDataset, k: int, dp_size: int, **kwargs: Any) -> list[MicroBatch]:
    """The micro batches of step ``k`` on all ranks, in order of their index; every rank has the same number of them."""
    ranks = [make_batches(dataset, dp_rank=rank, dp_size=dp_size, **kwargs).step(k) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    return sorted((batch for batches in ranks for batch in batches), key=lambda batch: batch.index)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), sizes, sizes, sizes, st.integers(0, 2), st.booleans())
def test_each_row_once_an_epoch_on_any_number_of_ranks(lengths: list[int], micro: int, total: int, dp: int, epoch: int, shuffle: bool) -> None:
    dataset = make_dataset(lengths)
    kwargs = {"micro_batch_size": micro, "global_batch_size": total, "shuffle": shuffle}
    steps = make_batches(dataset, **kwargs).steps_per_epoch
    assert steps == -(-len(lengths) // total)
    seen: list[int] = []
    for k in range(epoch * steps, (epoch + 1) * steps):
        alone, spread = all_ranks(dataset, k, 1, **kwargs), all_ranks(dataset, k, dp, **kwargs)
        real = [batch for batch in spread if batch.rows]
        assert [batch.rows for batch in real] == [batch.rows for batch in alone]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(alone, real, strict=True))
        assert all(len(batch.rows) <= micro for batch in real)
        assert len(spread) - len(real) < dp
        assert sum(float(batch.weights.sum()) for batch in spread) == pytest.approx(sum(float(batch.weights.sum()) for batch in alone))
        seen += [row for batch in real for row in batch.rows]
    assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 3))
def test_labels_look_one_token_ahead_and_padding_counts_for_nothing(lengths: list[int], multiple: int, k: int) -> None:
    dataset = make_dataset(lengths)
    for batch in make_batches(dataset, pad_token_id=7, pad_to_multiple=multiple).step(k):
        width = max(lengths[row] for row in batch.rows)
        assert batch.input_ids.shape == (len(batch.rows), -(-width // multiple) * multiple)
        assert batch.num_tokens == sum(lengths[row] for row in batch.rows)
        for i, row in enumerate(batch.rows):
            length, encoded = lengths[row], dataset[row]
            assert batch.input_ids[i].tolist() == encoded.input_ids + [7] * (batch.input_ids.shape[1] - length)
            assert batch.weights[i, : length - 1].tolist() == encoded.weights[1:]
            assert not batch.weights[i, length - 1 :].any()
            expected = [token if weight else -100 for token, weight in zip(encoded.input_ids[1:], encoded.weights[1:], strict=True)]
            assert batch.labels[i, : length - 1].tolist() == expected
            assert (batch.labels[i, length - 1 :] == -100).all()
            assert batch.position_ids[i].tolist() == list(range(batch.input_ids.shape[1]))


def test_types_and_the_filler() -> None:
    dataset = make_dataset([3, 5, 2])
    batches = all_ranks(dataset, 0, 4, pad_token_id=9, pad_to_multiple=4)
    assert [batch.index for batch in batches] == [0, 1, 2, 3]
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2]
    filler = batches[3]
    assert (filler.rows, filler.num_tokens) == ([], 0)
    assert filler.input_ids.tolist() == [[9] * 4]
    assert filler.labels.tolist() == [[-100] * 4]
    assert filler.weights.sum() == 0
    types = (torch.int64, torch.int64, torch.float32, torch.int64)
    assert all((b.input_ids.dtype, b.labels.dtype, b.weights.dtype, b.position_ids.dtype) == types for b in batches)


def test_rows_of_a_step_are_sorted_longest_first_and_ties_keep_the_order() -> None:
    batches = make_batches(make_dataset([2, 5, 5, 9, 1]), micro_batch_size=2, global_batch_size=5, shuffle=False)
    assert batches.rows_of(0) == [[3, 1], [2, 0], [4]]
    assert [batch.rows for batch in batches.step(0)] == [[3, 1], [2, 0], [4]]
    assert padding_share(batches.step(0)) == pytest.approx(1 - 22 / (18 + 10 + 1))
    assert padding_share([]) == 0.0


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    dataset = make_dataset([4] * 40)
    first = [make_batches(dataset, seed=1).rows_of(k) for k in range(20)]
    batches = make_batches(dataset, seed=1)
    assert [batches.rows_of(k) for k in reversed(range(20))] == first[::-1]  # any step, in any order
    assert first[:10] != first[10:]
    assert [make_batches(dataset, seed=2).rows_of(k) for k in range(10)] != first[:10]
    assert [batches.epoch_of(k) for k in (0, 9, 10, 25)] == [0, 0, 1, 2]
    plain = make_batches(dataset, shuffle=False)
    assert plain.rows_of(3) == plain.rows_of(13) == [[12, 13], [14, 15]]


def test_a_short_last_batch_is_kept_or_dropped() -> None:
    dataset = make_dataset([3] * 10)
    kept, dropped = make_batches(dataset), make_batches(dataset, drop_last=True)
    assert (kept.steps_per_epoch, dropped.steps_per_epoch) == (3, 2)
    assert [len(part) for part in kept.rows_of(2)] == [2]
    assert [len(part) for part in dropped.rows_of(2)] == [2, 2]
    assert dropped.epoch_of(2) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size is 0, wanted at least 1"),
        ({"pad_to_multiple": -2}, "pad_to_multiple is -2, wanted at least 1"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank is 2, wanted 0 to 1"),
        ({"drop_last": True}, "the data set has 3 rows, less than one global batch of 4; keep the last batch or lower it"),
    ],
)
def test_wrong_settings_are_one_line(kwargs: dict[str, int | bool], message: str) -> None:
    with pytest.raises(DataError) as wrong:
        make_batches(make_dataset([1, 2, 3]), **kwargs)
    assert str(wrong.value) == message
    with pytest.raises(DataError, match="the data set is empty"):
        make_batches(make_dataset([]))
    with pytest.raises(ValueError, match="step -1, wanted at least 0"):
        make_batches(make_dataset([1])).rows_of(-1)


# ---- rows end to end


def check_end_to_end(dataset: EncodedDataset, batch: MicroBatch, pad: int, multiple: int) -> None:
    """Every row of the batch is there as a row alone would be, and nothing else counts."""
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.tolist()
    width = batch.input_ids.shape[1]
    assert batch.input_ids.shape[0] == 1
    assert bounds[0] == 0
    assert bounds[-1] == width
    assert width % multiple == 0
    assert width - batch.num_tokens < multiple or not batch.rows
    for row, start, end in zip(batch.rows, bounds[:-1], bounds[1:], strict=False):
        alone = Batches(dataset, micro_batch_size=1, global_batch_size=1)._micro_batch(0, [row])
        for name in ("input_ids", "labels", "weights", "position_ids"):
            assert torch.equal({**tensors(batch)}[name][0, start:end], {**tensors(alone)}[name][0]), name
    assert batch.num_tokens == bounds[len(batch.rows)]
    assert (batch.input_ids[0, batch.num_tokens :] == pad).all()
    assert (batch.labels[0, batch.num_tokens :] == -100).all()
    assert not batch.weights[0, batch.num_tokens :].any()


def tensors(batch: MicroBatch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.input_ids, "labels": batch.labels, "weights": batch.weights, "position_ids": batch.position_ids}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), sizes, sizes, sizes, st.integers(0, 2), st.booleans(), st.integers(1, 4))
def test_packed_rows_are_seen_once_an_epoch_on_any_number_of_ranks(
    lengths: list[int], micro: int, total: int, dp: int, epoch: int, packing: bool, multiple: int
) -> None:
    dataset = make_dataset(lengths)
    kwargs: dict[str, Any] = {"micro_batch_size": micro, "global_batch_size": total, "pad_token_id": 7, "pad_to_multiple": multiple}
    kwargs |= {"packs": PackIndex(dataset.lengths, 12)} if packing else {"padding_free": True}
    steps = make_batches(dataset, **kwargs).steps_per_epoch
    seen: list[int] = []
    for k in range(epoch * steps, (epoch + 1) * steps):
        alone, spread = all_ranks(dataset, k, 1, **kwargs), all_ranks(dataset, k, dp, **kwargs)
        real = [batch for batch in spread if batch.rows]
        assert [batch.rows for batch in real] == [batch.rows for batch in alone]
        for batch in spread:
            check_end_to_end(dataset, batch, 7, multiple)
        if packing and micro == 1:
            assert all(batch.num_tokens <= 12 for batch in real)
        seen += [row for batch in real for row in batch.rows]
    assert sorted(seen) == list(range(len(lengths)))


def test_ranks_and_micro_batches_cost_about_the_same() -> None:
    """By the squares of the lengths as well as by their sum: a pack of one long row costs more than one of many short ones."""
    lengths = np.clip(np.random.default_rng(1).lognormal(5.0, 1.2, 4000), 4, 2048).astype(int).tolist()
    dataset = make_dataset(lengths)
    packs = PackIndex(dataset.lengths, 2048)
    batches = Batches(dataset, micro_batch_size=1, global_batch_size=32, dp_size=4, packs=packs, linear_cost=256)
    squares = dataset.lengths**2
    spread, rounds, uneven = [], [], list[float]()
    for k in range(batches.steps_per_epoch - 1):
        parts = batches.rows_of(k)
        dealt = batches.dealt(parts)
        assert sorted(number for rank in dealt for number in rank) == list(range(32))
        loads = [sum(int(squares[parts[number]].sum()) for number in rank) for rank in dealt]
        spread.append(max(loads) / min(loads))
        costs = [batches.cost(part) for part in parts]
        rounds.append(np.mean([max(costs[i : i + 4]) / min(costs[i : i + 4]) for i in range(0, 32, 4)]))
        tokens = [sum(int(dataset.lengths[parts[number]].sum()) for number in rank) for rank in dealt]
        uneven.append(max(tokens) / min(tokens))
    unsorted = [np.random.default_rng(k).permutation(packs.of_epoch(0).sums(squares))[:32].reshape(4, 8).sum(1) for k in range(50)]
    by_chance = np.mean([loads.max() / loads.min() for loads in unsorted])
    assert np.mean(spread) < 1.08
    assert sorted(uneven)[-2] < 1.001, "all but the step that has the last pack, which is not full"
    assert np.median(rounds) < 1.3
    assert by_chance > 1.3, "there is something to balance"


def test_micro_batches_of_several_packs_are_balanced_too() -> None:
    dataset = make_dataset([9, 1, 8, 2, 7, 3, 6, 4])
    batches = Batches(dataset, micro_batch_size=2, global_batch_size=8, shuffle=False, padding_free=True, linear_cost=0)
    assert sorted(sorted(dataset.lengths[part].tolist()) for part in batches.rows_of(0)) == [[1, 9], [2, 8], [3, 7], [4, 6]]
    costs = [batches.cost(part) for part in batches.rows_of(0)]
    assert costs == sorted(costs, reverse=True)


def test_a_mixture_decides_what_an_epoch_holds() -> None:
    data = make_dataset([3 + i % 5 for i in range(30)])
    mixture = Mixture((20, 10), (6, 15), seed=4)
    batches = Batches(data, micro_batch_size=2, global_batch_size=4, mixture=mixture)
    assert batches.steps_per_epoch == 6
    for epoch in range(2):
        rows = [row for k in range(6) for part in batches.rows_of(6 * epoch + k) for row in part]
        assert sorted(rows) == sorted(mixture.epoch(epoch).tolist())
        assert sum(row >= 20 for row in rows) == 15
    with pytest.raises(ValueError, match="a mixture of 30 rows for a data set of 29"):
        Batches(make_dataset([3] * 29), micro_batch_size=1, global_batch_size=1, mixture=mixture)
