from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.train.schedule import LearningRate


def test_warm_up_then_cosine_to_the_minimum() -> None:
    rate = LearningRate(peak=1.0, total_steps=110, warmup_steps=10, minimum=0.1)
    assert [rate.at(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate.at(10) == 1.0
    assert rate.at(60) == pytest.approx(0.55)
    assert rate.at(110) == pytest.approx(0.1)
    assert rate.at(500) == pytest.approx(0.1), "past the end it stays"


def test_equals_transformers_cosine_schedule() -> None:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, 5, 40)
    ours = LearningRate(peak=0.3, total_steps=40, warmup_steps=5)
    wanted = []
    for _ in range(40):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    # theirs starts the warm-up with a step at zero, which teaches nothing; from the peak on the two are one
    assert [ours.at(step) for step in range(5, 40)] == pytest.approx(wanted[5:])
    assert [ours.at(step) for step in range(4)] == pytest.approx(wanted[1:5])


@given(st.integers(1, 300), st.integers(0, 50), st.sampled_from(["cosine", "linear", "constant"]))
def test_stays_between_zero_and_the_peak_and_never_rises_after_the_warm_up(total: int, warmup: int, kind: str) -> None:
    rate = LearningRate(peak=2.0, total_steps=total, warmup_steps=min(warmup, total - 1), kind=kind)  # type: ignore[arg-type]
    values = [rate.at(step) for step in range(total + 1)]
    assert all(0 <= value <= 2.0 and math.isfinite(value) for value in values)
    after = values[min(warmup, total - 1) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert kind == "constant" or values[-1] == pytest.approx(0.0, abs=1e-9)
