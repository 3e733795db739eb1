"""Shares to the row, passes that lose and repeat nothing, and order by seed and epoch alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.data.mixing import Mixture, quotas, shares_of, table
from mswift.errors import DataError

sizes_and_weights = st.lists(st.tuples(st.integers(5, 400), st.floats(0.1, 10)), min_size=1, max_size=5)


@settings(deadline=None)
@given(sizes_and_weights, st.sampled_from(["first_exhausted", "all_exhausted"]))
def test_an_epoch_follows_the_weights(given: list[tuple[int, float]], stopping: str) -> None:
    sizes, weights = [size for size, _ in given], [weight for _, weight in given]
    shares = shares_of(weights, None)
    assert shares is not None
    assert sum(shares) == pytest.approx(1)
    if stopping == "first_exhausted" and min(size / share for size, share in zip(sizes, shares, strict=True)) * min(shares) < 1:
        return  # a source would be starved, which is an error of its own
    found = quotas(sizes, shares, stopping)  # type: ignore[arg-type]
    total = sum(found)
    assert all(abs(quota - share * total) <= 1 + len(sizes) * share for quota, share in zip(found, shares, strict=True))
    if stopping == "first_exhausted":
        assert all(quota <= size for quota, size in zip(found, sizes, strict=True)), "nothing is repeated"
        assert any(quota + 1 >= size for quota, size in zip(found, sizes, strict=True)), "one source is through"
    else:
        assert all(quota >= size for quota, size in zip(found, sizes, strict=True)), "every source is through"
        assert any(quota <= size + 1 for quota, size in zip(found, sizes, strict=True)), "and not longer than that"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 70)), min_size=1, max_size=4), st.integers(0, 3), st.booleans(), st.booleans())
def test_passes_lose_and_repeat_nothing(pairs: list[tuple[int, int]], seed: int, shuffle: bool, spread: bool) -> None:
    sizes, wanted = tuple(size for size, _ in pairs), tuple(quota for _, quota in pairs)
    mixture = Mixture(sizes, wanted, seed, shuffle, spread)
    epochs = [mixture.epoch(epoch) for epoch in range(4)]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    for rows in epochs:
        assert len(rows) == mixture.rows_per_epoch
        assert np.bincount(owners[rows], minlength=len(sizes)).tolist() == list(wanted)
    for source, (size, quota) in enumerate(pairs):
        counts = Counter(row for rows in epochs for row in rows.tolist() if owners[row] == source)
        assert set(counts.values()) <= {4 * quota // size, 4 * quota // size + 1}, "no row is seen again before all were"
    again = Mixture(sizes, wanted, seed, shuffle, spread).epoch(2)
    assert (again == epochs[2]).all()


def test_epochs_and_seeds_differ() -> None:
    mixture = Mixture((50, 40), (20, 40), 1)
    first, second = (mixture.epoch(epoch).tolist() for epoch in (0, 1))
    assert first != second
    assert not set(first) & set(second) & set(range(40)), "the next epoch goes on where this one stopped"
    assert first != Mixture((50, 40), (20, 40), 2).epoch(0).tolist()
    assert Mixture((50, 40), (50, 40), 1).is_plain


def test_without_shuffling_the_order_is_that_of_the_sources() -> None:
    assert Mixture((3, 2), (3, 2), shuffle=False).epoch(7).tolist() == [0, 1, 2, 3, 4]
    assert Mixture((4, 2), (4, 2), shuffle=False, spread=True).epoch(0).tolist() == [0, 4, 1, 2, 5, 3]
    assert Mixture((4, 2), (3, 3), shuffle=False).epoch(1).tolist() == [3, 0, 1, 5, 4, 5]


@pytest.mark.parametrize(
    ("weights", "flag", "message"),
    [
        ([0.5, None], None, "1 of 2 entries of --dataset have a weight (@), wanted all or none"),
        ([0.5, 0.5], [0.5, 0.5], "--interleave_prob and weights in --dataset (@) were both given, wanted one of them"),
        ([None, None], [1.0], "--interleave_prob has 1 numbers for 2 entries of --dataset, wanted one for each"),
        ([None, None], [1.0, 0.0], "--interleave_prob is 1 0, wanted numbers above 0"),
    ],
)
def test_shares_that_make_no_sense(weights: list[float | None], flag: list[float] | None, message: str) -> None:
    with pytest.raises(DataError) as wrong:
        shares_of(weights, flag)
    assert str(wrong.value) == message
    assert shares_of([None, None], None) is None
    assert shares_of([None, None], [2, 6]) == [0.25, 0.75]


def test_mixtures_without_rows() -> None:
    with pytest.raises(DataError, match=r"^the mixture is empty: a source has no row left; check --dataset and --max_length$"):
        quotas([3, 0], None)
    with pytest.raises(DataError, match=r"gives entry 2 of --dataset no row in an epoch of 5: its share is 0\.10%; raise it, or take"):
        quotas([5, 5], [0.999, 0.001])
    assert quotas([5, 7], None) == [5, 7]
    assert quotas([30, 10], [0.5, 0.5], "all_exhausted") == [30, 30]
    assert quotas([30, 10], [0.5, 0.5]) == [10, 10]


def test_the_table_says_what_an_epoch_holds() -> None:
    lines = table(["a.jsonl", "b.jsonl"], Mixture((100, 50), (25, 75)), [1000, 4000])
    assert lines == [
        "source   rows  in an epoch  tokens   share",
        "a.jsonl   100           25     250    4.0%",
        "b.jsonl    50           75   6,000   96.0%",
        "all       150          100   6,250  100.0%",
    ]
    assert len(table(["a"], Mixture((1,), (1,)), [0])) == 2
