"""Stages of unequal size: training, parity, conversion, resumption and the dry run are those of even stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mswift.config.splits import PipelineSplit
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, losses
from tests.distributed.test_dry_run import test_what_is_imagined_is_what_is_held as check_dry_run
from tests.distributed.test_layouts import assert_same_losses
from tests.distributed.test_megatron_checkpoint import Trip, assert_same, to_hf, to_megatron
from tests.distributed.test_resume import test_resume_on_another_layout as check_resume
from tests.parity.cases import options_of
from tests.parity.checks import check_against_transformers
from tests.tiny import make_checkpoint, write_rows

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
FIRST3, LAST3 = PipelineSplit(first=3), PipelineSplit(last=3)
ENDS_ALONE = PipelineSplit(text="E|t*4|L")
HOLES = PipelineSplit(text="E|tt|t|tL")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2-first3": (2, {"pp": 2, "split": FIRST3}),
    "pp3-first-last": (3, {"pp": 3, "split": PipelineSplit(1, 1)}),
    "pp3-ends-alone": (3, {"pp": 3, "split": ENDS_ALONE}),
    "pp2-vpp2-holes": (2, {"pp": 2, "vpp": 2, "split": HOLES}),
    "pp3-both-counted": (3, {"pp": 3, "split": PipelineSplit(count_embedding=True, count_loss=True)}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("splits")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return Run(make_checkpoint(folder / "model", **heads), write_rows(folder / "rows.jsonl"), steps=8, lora=LORA)


@pytest.fixture(scope="module")
def expected_lora(base: Run) -> list[tuple[float, float]]:
    return run_distributed(losses, 1, base)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_losses_do_not_depend_on_the_split(layout: str, base: Run, expected_lora: list[tuple[float, float]]) -> None:
    world, sizes = LAYOUTS[layout]
    assert_same_losses(world, replace(base, **sizes), expected_lora)


def test_full_losses_do_not_depend_on_the_split(base: Run) -> None:
    run = replace(base, lora=None, learning_rate=1e-3)
    expected = run_distributed(losses, 1, run)[0]
    for layout in ("pp2-first3", "pp3-ends-alone"):
        world, sizes = LAYOUTS[layout]
        assert_same_losses(world, replace(run, **sizes), expected)


PARITY = [
    ("qwen3_moe/not-normalised", (2, {"pp": 2, "split": FIRST3})),
    ("qwen2_moe/normalised-some-dense", (4, {"pp": 2, "ep": 2, "split": LAST3})),
    ("gemma3_text/scaled", (3, {"pp": 3, "split": PipelineSplit(text="Et|t*2|tL")})),
    ("llama4_text/plain", (2, {"pp": 2, "vpp": 2, "split": HOLES})),
    ("qwen3/tied", (3, {"pp": 3, "split": ENDS_ALONE})),
]


@pytest.mark.parametrize(("case", "layout"), PARITY, ids=lambda part: part if isinstance(part, str) else part[1]["split"].describe())
def test_patterns_of_layers_cross_stages(case: str, layout: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    check_against_transformers(case, *layout, tmp_path)


def test_any_split_reads_what_another_wrote(tmp_path: Path) -> None:
    models = {}
    for case in ("qwen3_moe/not-normalised", "qwen2/tied"):
        family, changes = options_of(case)
        models[case] = make_checkpoint(tmp_path / "source" / family, family, **changes)
    wrote, reads = {"pp": 3, "split": ENDS_ALONE}, {"pp": 3, "split": PipelineSplit(1, 1)}
    trips = [Trip(Run(source, **wrote), tmp_path / "m" / source.name) for source in models.values()]
    run_distributed(to_megatron, 3, trips, timeout=120)
    back = [Trip(Run(trip.target, **reads), tmp_path / "b" / trip.target.name) for trip in trips]
    run_distributed(to_hf, 3, back, timeout=120)
    again = [Trip(Run(source, **wrote), tmp_path / "e" / source.name) for source in models.values()]
    run_distributed(to_hf, 3, again, timeout=120)
    for source, one, two in zip(models.values(), back, again, strict=True):
        assert_same(source, one.target)
        assert_same(source, two.target)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_resume_on_another_split(tuner: str, base: Run, tmp_path: Path) -> None:
    check_resume(tuner, (3, {"pp": 3, "split": ENDS_ALONE}), (2, {"pp": 2, "split": FIRST3}), base, tmp_path)


def test_dry_run_of_a_split(tmp_path: Path) -> None:
    check_dry_run("qwen3_moe/not-normalised", {"pp": 2, "vpp": 2, "split": HOLES}, tmp_path)
