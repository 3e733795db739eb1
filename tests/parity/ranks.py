"""What the parity tests run inside the processes of a world: whole logits and gradients of a model that is spread over them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mswift.data.batches import MicroBatch
from tests.distributed.runs import Run, open_batches, open_engine, open_model, train


@dataclass(frozen=True)
class Measured:
    """Figures of one rank. `logits` fp32 ``[b, s, vocabulary]``, on the last pipeline stage only."""

    logits: Tensor | None
    loss: float
    grad_norm: float


def export_gradients(engine: Any, directory: Path) -> None:
    """Write the gradients of the last step as if they were the weights of the checkpoint, by Hugging Face name."""
    from mswift.conversion.export import export_model
    from mswift.conversion.export_plan import ExportParameter
    from mswift.families.model import base_parameters

    model = engine.model
    parameters = [
        ExportParameter(name, tuple(parameter.shape), torch.float32, shard, functools.partial(_gradient, parameter))
        for chunk in model.chunks
        for name, parameter, shard in base_parameters(chunk, model.groups)
    ]
    export_model(parameters, model.rules, directory, config={}, groups=model._export_groups())


def _gradient(tensor: Tensor) -> Tensor:
    return tensor.main_grad.detach() if isinstance(tensor, torch.nn.Parameter) else torch.zeros_like(tensor)


def export_adapter_gradients(engine: Any, directory: Path) -> None:
    """The same of an adapter, as a PEFT directory. The adapter itself is lost: its gradients are put in its place."""
    with torch.no_grad():
        for _, module in engine.model.adapters():
            for factor in module.factors.values():
                factor.copy_(factor.main_grad)
    engine.export_adapter(directory)


def measure(rank: int, world: int, run: Run, batches: Sequence[MicroBatch], gradients: Path) -> Measured:
    """Logits of the first micro batch, loss and gradients of a training step that changes nothing; for `run_distributed`."""
    from mswift.objectives.sft import SupervisedObjective

    engine = open_engine(run, world)
    logits = engine.model.logits(batches[0].input_ids)
    copies, own = engine.groups.layout.dp, engine.groups.coords.dp
    assert len(batches) % copies == 0
    result = engine.train_step(batches[own::copies], SupervisedObjective(), step=0, learning_rate=0.0)
    (export_gradients if engine.model.lora is None else export_adapter_gradients)(engine, gradients)
    return Measured(logits, result.loss, result.grad_norm)


@dataclass(frozen=True)
class RoundTrip:
    """One checkpoint to be loaded and written again."""

    run: Run
    target: Path
    max_shard_size: str


def round_trip(rank: int, world: int, trips: Sequence[RoundTrip]) -> list[str]:
    """Load and export each; what each says of padded heads. For `run_distributed`."""
    padded = []
    for trip in trips:
        model = open_model(trip.run, world)
        model.export_merged(trip.target, max_shard_size=trip.max_shard_size)
        padded.append(model.padded_heads)
    return padded


@dataclass(frozen=True)
class Trained:
    """What a short LoRA run left behind. `base_before`, `base_after`: hash of every base tensor of this rank, by global name."""

    logits: Tensor | None
    losses: list[float]
    rows_of_first_step: list[int]
    base_before: dict[str, str]
    base_after: dict[str, str]


def base_hashes(model: Any) -> dict[str, str]:
    """SHA-256 of the bytes of every weight that is not an adapter."""
    from mswift.families.model import base_parameters

    found = (entry for chunk in model.chunks for entry in base_parameters(chunk, model.groups))
    return {name: hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, parameter, _ in found}


def train_lora(rank: int, world: int, run: Run, ids: Tensor, folder: Path) -> Trained:
    """A few steps; writes `untouched` (merged before the first step), `adapter` and `merged` into `folder`. For `run_distributed`."""
    engine = open_engine(run, world)
    batches = open_batches(run, engine)
    before = base_hashes(engine.model)
    engine.export_merged(folder / "untouched", max_shard_size="60KB")
    losses = [result.loss for result in train(engine, batches, run)]
    engine.export_adapter(folder / "adapter")
    engine.export_merged(folder / "merged", max_shard_size="60KB")
    rows = [row for batch in batches.step(0) for row in batch.rows]
    return Trained(engine.model.logits(ids), losses, rows, before, base_hashes(engine.model))


def adapter_logits(rank: int, world: int, runs: Sequence[Run], ids: Tensor, copies: Sequence[Path] = ()) -> list[Tensor | None]:
    """Logits with the adapter of each run; the adapters are written again to `copies`, if there are any. For `run_distributed`."""
    found = []
    for index, run in enumerate(runs):
        model = open_model(run, world)
        found.append(model.logits(ids))
        if copies:
            model.export_adapter(copies[index], base_model=str(run.checkpoint))
    return found


@dataclass(frozen=True)
class FirstStep:
    """Figures of the first step of a run, and the rows of its global batch."""

    loss: float
    grad_norm: float
    rows: list[int]


def first_step(rank: int, world: int, run: Run, gradients: Path) -> FirstStep:
    """The step that a run would begin with, from real rows; its adapter gradients go to `gradients`. For `run_distributed`."""
    engine = open_engine(run, world)
    batches = open_batches(run, engine)
    result = train(engine, batches, run, steps=1)[0]
    export_adapter_gradients(engine, gradients)
    return FirstStep(result.loss, result.grad_norm, [row for batch in batches.step(0) for row in batch.rows])
