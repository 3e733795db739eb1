"""Rank arithmetic: checked for thousands of ranks on one core, against megatron-core's own rank order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.errors import LayoutError, MswiftError
from mswift.parallel.layout import ExpertCoords, ParallelLayout, RankCoords

SIZES = st.sampled_from([1, 2, 3, 4, 8])


@given(tp=SIZES, pp=SIZES, cp=SIZES, dp=st.integers(1, 16))
def test_every_rank_has_one_place(tp: int, pp: int, cp: int, dp: int) -> None:
    layout = ParallelLayout(world=tp * pp * cp * dp, tp=tp, pp=pp, cp=cp)
    places = [layout.coords(rank) for rank in range(layout.world)]
    assert layout.dp == dp
    assert len(set(places)) == layout.world
    assert [layout.rank_of(place) for place in places] == list(range(layout.world))


def test_order_is_megatrons_up_to_4096_ranks() -> None:
    from megatron.core.parallel_state import RankGenerator

    layout = ParallelLayout(world=4096, tp=8, pp=16, cp=2)
    generator = RankGenerator(tp=8, ep=1, dp=layout.dp, pp=16, cp=2, order="tp-cp-ep-dp-pp")
    for axis in ("tp", "cp", "dp", "pp"):
        for group in generator.get_ranks(axis):
            assert [getattr(layout.coords(rank), axis) for rank in group] == list(range(len(group)))
    assert layout.coords(4095) == RankCoords(tp=7, cp=1, dp=15, pp=15)


def test_order_of_experts_is_megatrons_up_to_4096_ranks() -> None:
    from megatron.core.parallel_state import RankGenerator

    layout = ParallelLayout(world=4096, tp=8, pp=8, ep=16, etp=4)
    generator = RankGenerator(tp=4, ep=16, dp=layout.expert_replicas, pp=8, cp=1, order="tp-cp-ep-dp-pp")
    for axis, ours in (("tp", "etp"), ("ep", "ep"), ("dp", "replica")):
        for group in generator.get_ranks(axis):
            assert [getattr(layout.expert_coords(rank), ours) for rank in group] == list(range(len(group)))
    assert layout.expert_coords(4095) == ExpertCoords(etp=3, ep=15, replica=7)
    assert (layout.independent_copies, ParallelLayout(world=4, tp=2).independent_copies) == (1, 2)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"world": 3, "tp": 2}, "tp(2) x pp(1) x cp(1) = 2 does not divide 3 process(es)"),
        ({"world": 1, "tp": 2}, "NPROC_PER_NODE=2"),
        ({"world": 4, "pp": 3}, "pp(3)"),
        ({"world": 2, "tp": 0}, "tp is 0, wanted at least 1"),
        ({"world": 4, "ep": 3}, "etp(1) x ep(3) x pp(1) = 3 does not divide 4"),
        ({"world": 2, "vpp": 2}, "vpp(2) needs pp of at least 2"),
        ({"world": 0}, "world is 0"),
    ],
)
def test_impossible_sizes_are_refused_with_every_factor(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        ParallelLayout(**sizes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MswiftError)
    assert isinstance(caught.value, ValueError)


def test_a_model_that_does_not_divide_is_refused_with_every_factor() -> None:
    layout = ParallelLayout(world=4, tp=2, pp=2)
    layout.check_model(num_layers=4, ffn_size=48)
    with pytest.raises(LayoutError) as caught:
        layout.check_model(num_layers=5, ffn_size=47)
    assert "MLP width 47 by tp(2)" in str(caught.value)
    assert "5 layers by pp(2) x vpp(1) = 2" in str(caught.value)


def test_experts_that_do_not_divide_are_refused() -> None:
    layout = ParallelLayout(world=4, tp=2, ep=2, etp=2)
    layout.check_model(num_layers=4, ffn_size=48, num_experts=6, expert_size=28)
    with pytest.raises(LayoutError, match=r"0 experts by ep\(2\)"):
        layout.check_model(num_layers=4, ffn_size=48, num_experts=0)
    layout.check_model(num_layers=4, ffn_size=48)
    with pytest.raises(LayoutError, match=r"5 experts by ep\(2\); expert width 27 by etp\(2\)"):
        layout.check_model(num_layers=4, ffn_size=48, num_experts=5, expert_size=27)
    with pytest.raises(LayoutError, match=r"etp\(1\) with ep\(1\) and tp\(2\)"):
        ParallelLayout(world=2, tp=2, etp=1)


def test_describe_and_bounds() -> None:
    assert ParallelLayout(world=4, tp=2).describe() == "tp2 pp1 dp2 (4 processes)"
    assert ParallelLayout().describe() == "tp1 pp1 dp1 (1 process)"
    with pytest.raises(LayoutError, match="rank 4 is outside"):
        ParallelLayout(world=4).coords(4)
