"""One training run inside a process of the harness, for tests that compare layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift.config.splits import EVEN, PipelineSplit
from mswift.data import EncodedDataset
from mswift.engines.base import StepResult


@dataclass(frozen=True)
class Run:
    """What to train, and how.

    `transformer` are TransformerConfig fields; `lora` are LoraSettings fields, None = every weight; `adapter` is a PEFT directory to go on
    from; `max_grad_norm` 0 leaves the gradients as they are.
    """

    checkpoint: Path
    rows: Path = Path()
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    split: PipelineSplit = EVEN
    steps: int = 5
    micro_batch_size: int = 2
    global_batch_size: int = 8
    learning_rate: float = 1e-2
    dtype: str = "float32"
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    lora: dict[str, Any] | None = None
    adapter: Path | None = None
    max_grad_norm: float = 1.0
    transformer: dict[str, Any] | None = None
    further: bool = False


def open_model(run: Run, world: int, *, deferred: bool = False) -> Any:
    """A MegatronModel of this process; the world must be joined already."""
    from mswift.engines.megatron_model import BuildSettings, MegatronModel
    from mswift.parallel.groups import make_groups
    from mswift.parallel.layout import ParallelLayout
    from mswift.runtime.device import select
    from mswift.tuners.lora import LoraSettings

    runtime = select("cpu")
    groups = make_groups(ParallelLayout(world=world, tp=run.tp, pp=run.pp, vpp=run.vpp, cp=run.cp, ep=run.ep, etp=run.etp, split=run.split))
    settings = BuildSettings(
        run.checkpoint, dtype=run.dtype, sequence_parallel=run.sequence_parallel, deferred=deferred, further=run.further, transformer=run.transformer
    )
    model = MegatronModel(settings, groups, runtime)
    if run.lora is not None:
        model.add_lora(LoraSettings(**run.lora))
    if run.adapter is not None:
        model.load_adapter(run.adapter)
    return model


def open_engine(run: Run, world: int) -> Any:
    """A MegatronEngine of this process; the world must be joined already."""
    from mswift.engines.megatron import MegatronEngine, OptimizerSettings

    optimizer = OptimizerSettings(use_distributed_optimizer=run.distributed_optimizer, max_grad_norm=run.max_grad_norm)
    return MegatronEngine(open_model(run, world), optimizer, seed=7, source=str(run.checkpoint))


def encode(run: Run) -> tuple[EncodedDataset, int]:
    """The rows as tokens, and the padding token."""
    from mswift.commands.session import load_tokenizer
    from mswift.data import encode_dataset, load_dataset
    from mswift.templates.chat import ChatTemplate

    tokenizer = load_tokenizer(run.checkpoint)
    return encode_dataset(load_dataset([str(run.rows)]), ChatTemplate(tokenizer)), tokenizer.pad_token_id


def open_batches(run: Run, engine: Any) -> Any:
    from mswift.data.batches import Batches

    data, pad = encode(run)
    layout = engine.groups.layout
    return Batches(
        data,
        micro_batch_size=run.micro_batch_size,
        global_batch_size=run.global_batch_size,
        dp_rank=engine.groups.coords.dp,
        dp_size=layout.dp,
        pad_token_id=pad,
        pad_to_multiple=layout.tp if run.sequence_parallel else 1,
    )


def train(engine: Any, batches: Any, run: Run, *, start: int = 0, steps: int | None = None) -> list[StepResult]:
    from mswift.objectives.sft import SupervisedObjective

    last = run.steps if steps is None else start + steps
    return [engine.train_step(batches.step(step), SupervisedObjective(), step=step, learning_rate=run.learning_rate) for step in range(start, last)]


def losses(rank: int, world: int, run: Run) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step; for `run_distributed`."""
    engine = open_engine(run, world)
    return [(result.loss, result.grad_norm) for result in train(engine, open_batches(run, engine), run)]
