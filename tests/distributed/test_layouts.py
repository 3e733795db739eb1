"""The layout does not change the numbers: one process trains, N gloo processes train the same, every loss is compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, losses
from tests.tiny import make_checkpoint, write_rows

STEPS = 20
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "tp2-sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2-dp2": (4, {"tp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp4-kv-split": (4, {"tp": 4}),
}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("layouts")
    return Run(make_checkpoint(folder / "model"), write_rows(folder / "rows.jsonl"), steps=STEPS, lora=LORA)


@pytest.fixture(scope="module")
def expected_lora(base: Run) -> list[tuple[float, float]]:
    return run_distributed(losses, 1, base)[0]


@pytest.fixture(scope="module")
def full_run(base: Run) -> Run:
    return replace(base, lora=None, learning_rate=1e-3)


@pytest.fixture(scope="module")
def expected_full(full_run: Run) -> list[tuple[float, float]]:
    return run_distributed(losses, 1, full_run)[0]


def assert_same_losses(world: int, run: Run, expected: list[tuple[float, float]]) -> None:
    ranks = run_distributed(losses, world, run, timeout=240)
    assert all(rank == ranks[0] for rank in ranks), "ranks report different figures"
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(ranks[0], expected, strict=True)):
        assert loss == pytest.approx(wanted, rel=1e-5), f"step {step}"
        assert norm == pytest.approx(wanted_norm, rel=1e-3), f"step {step}"
    assert expected[-1][0] < expected[0][0] - 0.1, "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_losses_do_not_depend_on_the_layout(layout: str, base: Run, expected_lora: list[tuple[float, float]]) -> None:
    world, sizes = LAYOUTS[layout]
    assert_same_losses(world, replace(base, **sizes), expected_lora)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "tp2-pp2"])
def test_full_losses_do_not_depend_on_the_layout(layout: str, full_run: Run, expected_full: list[tuple[float, float]]) -> None:
    world, sizes = LAYOUTS[layout]
    assert_same_losses(world, replace(full_run, **sizes), expected_full)
