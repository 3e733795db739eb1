"""What the parity tests run inside the processes of a world: whole logits and gradients of a model that is spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mswift.data.batches import MicroBatch
from tests.distributed.runs import Run, open_engine


@dataclass(frozen=True)
class Measured:
    """Figures of one rank. `logits` fp32 ``[b, s, vocabulary]``, on the last pipeline stage only."""

    logits: Tensor | None
    loss: float
    grad_norm: float


def logits_of(engine: Any, input_ids: Tensor) -> Tensor | None:
    """fp32 ``[b, s, vocabulary]`` without dropout, on the last pipeline stage; None on the others."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)

    def forward_step(_batches: Any, chunk: Any) -> tuple[Tensor, Any]:
        output = chunk(input_ids, positions, None, runtime_gather_output=True)
        return output, lambda logits, non_loss_data: logits

    for chunk in engine.chunks:
        chunk.eval()
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(engine.chunks),
            model=engine.chunks,
            num_microbatches=engine.groups.layout.pp,  # an interleaved pipeline wants that many
            seq_length=input_ids.shape[1],
            micro_batch_size=len(input_ids),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0][..., : engine.model.description.vocab_size].clone() if found else None


def export_gradients(engine: Any, directory: Path) -> None:
    """Write the gradients of the last step as if they were the weights of the checkpoint, by Hugging Face name."""
    from mswift.conversion.export import export_model
    from mswift.conversion.export_plan import ExportParameter
    from mswift.families.model import base_parameters

    model = engine.model
    parameters = [
        ExportParameter(name, tuple(parameter.shape), torch.float32, shard, parameter.main_grad.detach)
        for chunk in model.chunks
        for name, parameter, shard in base_parameters(chunk, model.groups)
    ]
    export_model(parameters, model.rules, directory, config={}, groups=model._export_groups())


def export_adapter_gradients(engine: Any, directory: Path) -> None:
    """The same of an adapter, as a PEFT directory. The adapter itself is lost: its gradients are put in its place."""
    with torch.no_grad():
        for _, module in engine.model.adapters():
            module.lora_a.copy_(module.lora_a.main_grad)
            module.lora_b.copy_(module.lora_b.main_grad)
    engine.export_adapter(directory)


def measure(rank: int, world: int, run: Run, batches: Sequence[MicroBatch], gradients: Path) -> Measured:
    """Logits of the first micro batch, loss and gradients of a training step that changes nothing; for `run_distributed`."""
    from mswift.objectives.sft import SupervisedObjective

    engine = open_engine(run, world)
    logits = logits_of(engine, batches[0].input_ids)
    result = engine.train_step(batches, SupervisedObjective(), step=0, learning_rate=0.0)
    (export_gradients if engine.model.lora is None else export_adapter_gradients)(engine, gradients)
    return Measured(logits, result.loss, result.grad_norm)
