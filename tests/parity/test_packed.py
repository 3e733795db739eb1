"""Rows end to end are trained as rows by themselves are: logits, loss and the gradient of every tensor, in every family and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.data.batches import IGNORED_LABEL, MicroBatch
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_engine
from tests.parity.cases import CASES, options_of
from tests.parity.reference import VOCABULARY, distance
from tests.tiny import make_model

LENGTHS = (9, 24, 1, 14, 17)
PADDING = 0
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "tp2-sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1, "recompute_method": "uniform"}
"""A family's case is its first one, and these, in which something depends on the length of a row or on places in it."""
FURTHER = (
    "llama/dynamic-rope",
    "phi3/longrope-long",
    "phi3/longrope-short",
    "qwen3_next/not-normalised-some-dense",
    "llama4_text/dense",
    "deepseek_v3/halves-biases",
    "mistral/windows",
    "cohere/head-norms",
)


@dataclass(frozen=True)
class Found:
    """What one rank saw: distances between packed and separate rows, relative to the largest logit and to the size of each gradient."""

    logits: float
    losses: tuple[float, float]
    norms: tuple[float, float]
    gradients: dict[str, float]


def rows_of(seed: int = 0) -> list[MicroBatch]:
    """A micro batch for each row, of its own length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, VOCABULARY, (1, length + 1), generator=generator)
        weights = torch.rand((1, length), generator=generator) * (torch.rand((1, length), generator=generator) < 0.66)
        labels = ids[:, 1:].masked_fill(weights == 0, IGNORED_LABEL)
        rows.append(MicroBatch(ids[:, :-1].contiguous(), labels, weights, torch.arange(length)[None], index, length, [index]))
    return rows


def pack(rows: Sequence[MicroBatch], multiple: int) -> MicroBatch:
    """The rows end to end, with a row of padding where the sum of their lengths is not a multiple."""
    tokens = sum(row.num_tokens for row in rows)
    missing = -tokens % multiple
    lengths = [row.num_tokens for row in rows] + [missing] * (missing > 0)
    filler = {"input_ids": PADDING, "labels": IGNORED_LABEL, "weights": 0.0}
    joined = {
        name: torch.cat([vars_of(row, name) for row in rows] + [torch.full((1, missing), value, dtype=vars_of(rows[0], name).dtype)], dim=1)
        for name, value in filler.items()
    }
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return MicroBatch(**joined, position_ids=positions, index=rows[0].index, num_tokens=tokens, rows=[], cu_seqlens=bounds)


def vars_of(batch: MicroBatch, name: str) -> Tensor:
    return {"input_ids": batch.input_ids, "labels": batch.labels, "weights": batch.weights}[name]


def compare(rank: int, world: int, run: Run) -> Found:
    """For `run_distributed`: the same rows by themselves and in two packs, without a step."""
    from mswift.objectives.sft import SupervisedObjective

    engine = open_engine(run, world)
    copies, own = engine.groups.layout.dp, engine.groups.coords.dp
    multiple = engine.groups.layout.tp if run.sequence_parallel else 1
    rows = rows_of()
    packs = [pack(rows[:2], multiple), pack(rows[2:], multiple)]
    rows = [replace(pack([row], multiple), cu_seqlens=None) for row in rows]
    alone = [engine.model.logits(row.input_ids) for row in rows]
    together = [engine.model.logits(packed.input_ids, packed.cu_seqlens) for packed in packs]
    logits = 0.0
    if alone[0] is not None:
        flat = torch.cat([part[0, : packed.num_tokens] for part, packed in zip(together, packs)])
        logits = distance(flat, torch.cat([part[0, : row.num_tokens] for part, row in zip(alone, rows)]))
        logits /= float(flat.abs().max())
        assert flat.std() > 0.01
    rows += [replace(rows[0], weights=torch.zeros_like(rows[0].weights))] * (-len(rows) % copies)
    first = engine.train_step(rows[own::copies], SupervisedObjective(), step=0, learning_rate=0.0)
    wanted = gradients_of(engine)
    second = engine.train_step(packs[own::copies], SupervisedObjective(), step=0, learning_rate=0.0)
    found = gradients_of(engine)
    far = {name: float((found[name] - grad).norm() / grad.norm().clamp(min=1e-12)) for name, grad in wanted.items()}
    return Found(logits, (first.loss, second.loss), (first.grad_norm, second.grad_norm), far)


def gradients_of(engine: Any) -> dict[str, Tensor]:
    named = (entry for chunk in engine.model.chunks for entry in chunk.named_parameters())
    return {name: parameter.main_grad.clone() for name, parameter in named if parameter.requires_grad}


def assert_equal(found: Sequence[Found]) -> None:
    for rank in found:
        assert rank.logits < 1e-5
        assert rank.losses[1] == pytest.approx(rank.losses[0], rel=1e-5)
        assert rank.norms[1] == pytest.approx(rank.norms[0], rel=1e-5)
        assert rank.norms[0] > 0.01
        assert len(rank.gradients) > 5
        worst = max(rank.gradients, key=rank.gradients.__getitem__)
        assert rank.gradients[worst] < 1e-5, worst


@pytest.mark.parametrize("case", [f"{family}/plain" for family in CASES] + list(FURTHER))
def test_packed_rows_are_trained_as_rows_alone(case: str, tmp_path: Path) -> None:
    family, changes = options_of(case)
    make_model(family, **changes).save_pretrained(tmp_path / "model")
    assert_equal(run_distributed(compare, 1, Run(tmp_path / "model", max_grad_norm=0.0)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["llama/plain", "qwen3_next/not-normalised-some-dense", "deepseek_v3/dense"])
def test_packed_rows_over_several_processes(case: str, layout: str, tmp_path: Path) -> None:
    family, changes = options_of(case)
    world, sizes = LAYOUTS[layout]
    if family == "qwen3_next" and sizes.get("tp") == 2:
        sizes = {**sizes, "sequence_parallel": True}  # its mixtures ask for it
    make_model(family, **changes).save_pretrained(tmp_path / "model")
    assert_equal(run_distributed(compare, world, Run(tmp_path / "model", max_grad_norm=0.0, **sizes)))


def test_packed_rows_with_everything_computed_again(tmp_path: Path) -> None:
    family, changes = options_of("llama4_text/dense")
    make_model(family, **changes).save_pretrained(tmp_path / "model")
    for transformer in (FULL, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}):
        assert_equal(run_distributed(compare, 1, Run(tmp_path / "model", max_grad_norm=0.0, transformer=transformer)))
