"""Packs: no row lost or repeated, none too full, little waste, the same for the same seed and epoch, rows that belong together together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.data.packing import PackIndex, Packs, Strategy
from mswift.errors import DataError

lengths_of_rows = st.lists(st.integers(1, 40), min_size=1, max_size=80)
strategies = st.sampled_from(["binpack", "sequential"])


def natural(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as conversations have them: a wide hump with a long tail."""
    draws = np.random.default_rng(seed).lognormal(6.2, 1.1, count)
    return np.clip(draws, 8, 8192).astype(np.int64)


def equal(first: Packs, second: Packs) -> bool:
    return np.array_equal(first.rows, second.rows) and np.array_equal(first.bounds, second.bounds)


@settings(deadline=None)
@given(lengths_of_rows, st.integers(40, 64), st.integers(0, 3), st.booleans(), strategies)
def test_no_row_is_lost_or_repeated_and_no_pack_too_full(lengths: list[int], capacity: int, epoch: int, shuffle: bool, strategy: Strategy) -> None:
    array = np.asarray(lengths, np.int64)
    index = PackIndex(array, capacity, shuffle=shuffle, strategy=strategy)
    packs = index.of_epoch(epoch)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths)))
    assert [row for pack in range(len(packs)) for row in packs.rows_of(pack)] == packs.rows.tolist()
    filled = packs.sums(array)
    assert filled.tolist() == [sum(lengths[row] for row in packs.rows_of(pack)) for pack in range(len(packs))]
    assert filled.min() > 0
    assert filled.max() <= capacity
    assert index.waste(packs) == pytest.approx(1 - sum(lengths) / (capacity * len(packs)))
    if strategy == "binpack":  # no two packs could have been one, and so more than half is full
        assert len(packs) == 1 or sorted(filled)[0] + sorted(filled)[1] > capacity
        assert len(packs) == len(index.of_epoch(epoch + 1))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=30), st.integers(0, 2))
def test_rows_that_belong_together_share_a_pack(groups: list[list[int]], epoch: int) -> None:
    lengths = np.asarray([length for group in groups for length in group], np.int64)
    bounds = np.concatenate(([0], np.cumsum([len(group) for group in groups]))).astype(np.int64)
    packs = PackIndex(lengths, 64, groups=bounds).of_epoch(epoch)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths)))
    assert packs.sums(lengths).max() <= 64
    pack_of = {row: pack for pack in range(len(packs)) for row in packs.rows_of(pack)}
    place_of = {row: place for place, row in enumerate(packs.rows.tolist())}
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert len({pack_of[row] for row in range(start, end)}) == 1
        assert [place_of[row] - place_of[start] for row in range(start, end)] == list(range(end - start))


def test_packs_are_a_function_of_lengths_seed_and_epoch() -> None:
    lengths = natural(3000)
    first = PackIndex(lengths, 8192, seed=1)
    again = PackIndex(lengths.copy(), 8192, seed=1)
    later = first.of_epoch(2)
    assert equal(first.of_epoch(0), again.of_epoch(0))
    assert equal(again.of_epoch(2), later), "whatever was asked for before"
    assert not equal(first.of_epoch(0), later)
    assert not equal(first.of_epoch(0), PackIndex(lengths, 8192, seed=2).of_epoch(0))
    plain = PackIndex(lengths, 8192, shuffle=False)
    assert equal(plain.of_epoch(0), plain.of_epoch(5))
    assert PackIndex(np.full(6, 4, np.int64), 8, shuffle=False, strategy="sequential").of_epoch(0).rows.tolist() == list(range(6))


def test_little_is_wasted() -> None:
    lengths = natural(20_000)
    best, plain = (PackIndex(lengths, 8192, strategy=strategy) for strategy in ("binpack", "sequential"))
    assert best.waste(best.of_epoch(0)) < 0.01
    assert best.waste(best.of_epoch(0)) < plain.waste(plain.of_epoch(0)) / 5


def test_packs_are_saved_and_found_again(tmp_path: Path) -> None:
    lengths = natural(500)
    made = PackIndex(lengths, 8192, folder=tmp_path).of_epoch(1)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 2
    found = PackIndex(lengths, 8192, folder=tmp_path).of_epoch(1)
    assert isinstance(found.rows, np.memmap)
    assert equal(made, found)
    swapped = np.asarray(found.rows)[::-1].copy()
    np.save(tmp_path / files[1], swapped)
    assert PackIndex(lengths, 8192, folder=tmp_path).of_epoch(1).rows.tolist() == swapped.tolist(), "it is read, not made again"
    lengths[0] += 1
    other = PackIndex(lengths, 8192, folder=tmp_path)
    assert equal(other.of_epoch(1), PackIndex(lengths, 8192).of_epoch(1)), "packs of other lengths are not taken"
    assert len(list(tmp_path.iterdir())) == 4
    assert PackIndex(lengths, 8192, folder=tmp_path / "nowhere").of_epoch(0).rows.size == 500


def test_what_is_longer_than_a_pack_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^a row has 9 tokens, a pack 8; raise --packing_length or lower --max_length$"):
        PackIndex(np.asarray([3, 9]), 8)
    with pytest.raises(DataError, match=r"^a group of rows that belong together has 9 tokens, a pack 8; "):
        PackIndex(np.asarray([3, 5, 4]), 8, groups=np.asarray([0, 1, 3]))
