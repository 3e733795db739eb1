"""The table of docs/kernels.md is what the kernels do now, and no more than a tenth above the least."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import pytest

from tests.unit.csrc import costs
from tests.unit.csrc.emulator import ROOT

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the execution model cannot be compiled")


def check(found: Iterable[costs.Cost]) -> int:
    text, count = (ROOT / "docs" / "kernels.md").read_text(encoding="utf8"), 0
    for cost in found:
        assert cost.row() in text, f"docs/kernels.md: the row of {cost.name} is now {cost.row()}"
        assert cost.flops <= 1.1 * cost.least_flops, cost.name
        assert cost.least_bytes <= cost.bytes, f"{cost.name} does not touch all that it has to"
        assert cost.bytes <= 1.1 * cost.least_bytes, cost.name
        count += 1
    assert costs.HEADER[0] in text
    return count


def test_rows_and_elements() -> None:
    meter = costs.Meter()
    assert check(costs.norms(meter)) == 5
    assert check(costs.element_wise(meter)) == 8


def test_experts_and_quantised_weights() -> None:
    meter = costs.Meter()
    assert check(costs.experts(meter)) == 3
    assert check(costs.quantised(meter)) == 4


def test_parts_of_a_gradient() -> None:
    """Written once and read once beside the least."""
    (cost,) = found = list(costs.in_parts(costs.Meter()))
    assert check(found) == 1
    assert cost.bytes == cost.least_bytes + 2 * 2 * 4 * 64 * 256


@pytest.mark.slow
def test_products() -> None:
    meter = costs.Meter()
    assert check(costs.lora(meter)) == 1
    assert check(costs.lora_gradients(meter)) == 2
    assert check(costs.dora(meter)) == 1
    assert check(costs.heads_on_chip(meter)) == 3
    assert check(costs.heads_by_groups(meter)) == 2
