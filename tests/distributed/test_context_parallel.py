"""A sequence spread over context-parallel ranks: losses, logits and gradients are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import RankError, run_distributed
from tests.distributed.runs import Run, losses, open_model
from tests.distributed.test_layouts import assert_same_losses
from tests.distributed.test_megatron_checkpoint import Trip, assert_same, to_hf, to_megatron
from tests.distributed.test_resume import test_resume_on_another_layout as check_resume
from tests.parity.cases import CASES, options_of
from tests.parity.checks import check_against_transformers
from tests.tiny import make_checkpoint, write_rows

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
CP2: dict[str, Any] = {"cp": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, CP2),
    "cp3": (3, {"cp": 3}),
    "cp2-tp2": (4, {"cp": 2, "tp": 2}),
    "cp2-tp2-sequence": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "cp2-pp2": (4, {"cp": 2, "pp": 2}),
    "cp2-dp2": (4, CP2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("context")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return Run(make_checkpoint(folder / "model", **heads), write_rows(folder / "rows.jsonl"), steps=20, lora=LORA)


@pytest.fixture(scope="module")
def expected(base: Run) -> list[tuple[float, float]]:
    return run_distributed(losses, 1, base)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_losses_do_not_depend_on_it(layout: str, base: Run, expected: list[tuple[float, float]]) -> None:
    world, sizes = LAYOUTS[layout]
    assert_same_losses(world, replace(base, **sizes), expected)


def test_full_losses_do_not_depend_on_it(base: Run) -> None:
    run = replace(base, lora=None, learning_rate=1e-3)
    one = run_distributed(losses, 1, run)[0]
    assert_same_losses(2, replace(run, cp=2, distributed_optimizer=True), one)


@pytest.fixture(scope="module")
def mixture(base: Run) -> Run:
    family, changes = options_of("qwen3_moe/plain")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    source = make_checkpoint(base.checkpoint.parent / "mixture", family, **{**changes, **heads})
    return replace(base, checkpoint=source, lora=None, learning_rate=1e-3)


EXPERTS = [
    (2, {"cp": 2, "ep": 2}),
    pytest.param(4, {"cp": 2, "ep": 2, "tp": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "sizes"), EXPERTS)
def test_experts_spread_over_it(world: int, sizes: dict[str, Any], mixture: Run) -> None:
    assert_same_losses(world, replace(mixture, **sizes), run_distributed(losses, 1, mixture)[0])


RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
SPECIAL = ("gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "ministral3", "cohere2", "olmo3")  # caps, sinks, chunks, latent, factors, windows
REST = [family for family in CASES if family not in (*RECURRENT, *SPECIAL)]
PARITY = [
    *((f"{family}/plain", (2, CP2)) for family in SPECIAL),
    *(pytest.param(f"{family}/plain", (2, CP2), marks=pytest.mark.slow) for family in REST),
    ("gemma3_text/scaled", (4, {"cp": 2, "pp": 2})),
    ("llama/dynamic-rope", (2, CP2)),
    ("phi3/longrope-long", (2, CP2)),
    ("deepseek_v3/halves-biases", (4, {"cp": 2, "tp": 2, "sequence_parallel": True})),
    ("gpt_oss/one-group", (4, {"cp": 4})),
    ("qwen2/windows", (3, {"cp": 3})),
]


@pytest.mark.parametrize(("case", "layout"), PARITY, ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part[1])))
def test_logits_and_gradients_equal_those_of_transformers(case: str, layout: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    check_against_transformers(case, *layout, tmp_path)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_resume_with_and_without_it(tuner: str, base: Run, tmp_path: Path) -> None:
    check_resume(tuner, (2, CP2), (2, {"tp": 2}), base, tmp_path / "from")
    check_resume(tuner, (1, {}), (2, CP2), base, tmp_path / "to")


def test_conversion_and_export_with_it(mixture: Run, tmp_path: Path) -> None:
    source, sizes = mixture.checkpoint, {"cp": 2, "ep": 2}
    run_distributed(to_megatron, 2, [Trip(Run(source, **sizes), tmp_path / "m")], timeout=120)
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m", cp=2), tmp_path / "back")], timeout=120)
    assert_same(source, tmp_path / "back")


def open_only(rank: int, world: int, run: Run) -> None:
    open_model(run, world)


def test_delta_nets_refuse_it(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "qwen3_5_text", full_attention_interval=2)
    with pytest.raises(RankError, match="context parallelism 2 is not supported by gated delta nets"):
        run_distributed(open_only, 2, Run(source, cp=2))
