"""Whole optimizer steps with compiled kernels and with plain torch: the same losses and gradient norms, in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mswift.kernels import choice, extension
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, losses
from tests.tiny import make_checkpoint, write_rows

pytestmark = pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the compiled kernels are not there, or the CPU has no bf16")
CASES = {
    "dense": ("llama", 1, {}),
    "dense-tp2": ("llama", 2, {"tp": 2, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}),
    "mixture": ("qwen3_moe", 1, {}),
    "mixture-ep2": ("qwen3_moe", 2, {"ep": 2}),
    "adapted-experts-etp2": ("qwen3_moe", 2, {"tp": 2, "etp": 2, "sequence_parallel": True, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def measure(rank: int, world: int, run: Run, kernels: str) -> tuple[list[tuple[float, float]], str]:
    choice.select(kernels)
    return losses(rank, world, run), choice.announcement()


def departure(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> float:
    """The largest relative difference of a loss or a gradient norm."""
    return max(abs(a / b - 1.0) for ours, theirs in zip(found, wanted, strict=True) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow) if name == "mixture" else name for name in CASES])
def test_steps_are_those_of_plain_torch(case: str, rows: Path, tmp_path: Path) -> None:
    kind, world, changes = CASES[case]
    checkpoint = make_checkpoint(tmp_path / "model", kind, head_dim=16)
    base = Run(checkpoint, rows, steps=3, learning_rate=1e-3, **changes)
    steps: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for dtype in ("float32", "bfloat16"):
        for kernels in ("auto", "reference"):
            found, said = run_distributed(measure, world, replace(base, dtype=dtype), kernels)[0]
            steps[dtype, kernels] = found
            assert ("attention" in said and "rms_norm" in said) == (kernels == "auto")
            assert (said == "plain torch (--kernels reference)") == (kernels == "reference")
        assert steps[dtype, "auto"] != steps[dtype, "reference"]  # the kernels did run
    exact = steps["float32", "reference"]
    assert departure(steps["float32", "auto"], exact) < 1e-5
    # in bf16 another rounding may send a token to another expert; neither of the two is nearer to the truth by right
    assert departure(steps["bfloat16", "auto"], exact) < 1.5 * departure(steps["bfloat16", "reference"], exact) + 5e-3
