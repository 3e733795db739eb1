"""Activations that are computed again in the backward pass are the same to the last bit, dropout included."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, losses
from tests.tiny import make_checkpoint, write_rows

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
RECOMPUTE = {
    "uniform": {**FULL, "recompute_method": "uniform"},
    "uniform-2": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {**FULL, "recompute_method": "block"},
    "core-attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
RUNS = {
    "lora": (1, {"lora": LORA}),
    "full": (1, {"learning_rate": 1e-3}),
    "lora-pp2": (2, {"pp": 2, "lora": LORA}),
    "full-tp2-sequence": (2, {"tp": 2, "sequence_parallel": True, "learning_rate": 1e-3}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("recompute")
    return Run(make_checkpoint(folder / "model", attention_dropout=0.1), write_rows(folder / "rows.jsonl"), steps=3)


@pytest.fixture(scope="module")
def expected(base: Run) -> dict[str, list[tuple[float, float]]]:
    return {name: run_distributed(losses, world, replace(base, **changes))[0] for name, (world, changes) in RUNS.items()}


CASES = [
    *(("lora", how) for how in RECOMPUTE),
    *(("full", how) for how in ("uniform", "block", "core-attention")),
    *(("lora-pp2", how) for how in ("uniform-2", "core-attention")),
    *(("full-tp2-sequence", how) for how in ("uniform", "core-attention")),
]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_recomputation_changes_no_loss_and_no_gradient(kind: str, how: str, base: Run, expected: dict[str, list[tuple[float, float]]]) -> None:
    world, changes = RUNS[kind]
    found = run_distributed(losses, world, replace(base, transformer=RECOMPUTE[how], **changes))
    assert found[0] == expected[kind]
    assert len({loss for loss, _ in found[0]}) == 3
    assert found[0][-1][0] < found[0][0][0]
