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
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def measure(rank: int, world: int, run: Run, kernels: str) -> tuple[list[tuple[float, float]], str]:
    choice.select(kernels)
    return losses(rank, world, run), choice.announcement()


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_plain_torch(case: str, rows: Path, tmp_path: Path) -> None:
    kind, world, changes = CASES[case]
    checkpoint = make_checkpoint(tmp_path / "model", kind, head_dim=16)
    base = Run(checkpoint, rows, steps=3, learning_rate=1e-3, **changes)
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 2e-2)):
        run = replace(base, dtype=dtype)
        compiled, said = run_distributed(measure, world, run, "auto")[0]
        plain, said_of_plain = run_distributed(measure, world, run, "reference")[0]
        assert "attention" in said
        assert "rms_norm" in said
        assert said_of_plain == "plain torch (--kernels reference)"
        assert compiled != plain  # the kernels did run
        for ours, theirs in zip(compiled, plain, strict=True):
            assert ours == pytest.approx(theirs, rel=limit)
