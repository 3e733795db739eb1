"""The Megatron engine: one optimizer step of a `MegatronModel` through megatron-core's schedules, gradient buffers and optimizer."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from mswift.data.batches import MicroBatch
from mswift.engines.base import StepResult
from mswift.engines.megatron_checkpoint import layers_alone
from mswift.engines.megatron_model import MegatronModel
from mswift.engines.optimizer_state import in_wanted_form
from mswift.errors import ConfigError
from mswift.families.model import global_name, shard_of
from mswift.families.modules import CausalLM, packed_rows
from mswift.objectives.base import Objective, Outputs
from mswift.tuners.lora import lora_modules


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW with fp32 master weights; `max_grad_norm` 0 measures the norm and does not clip."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_distributed_optimizer: bool = False


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Seed of all randomness inside one micro batch: the same in every layout, and after a resume, without any stored state."""
    return (seed * 1_000_003 + step * 8191 + index) % 2**63


class MegatronEngine:
    """Trains a `MegatronModel`. Implements `mswift.engines.base.Engine`."""

    def __init__(self, model: MegatronModel, optimizer: OptimizerSettings, *, seed: int, source: str) -> None:
        self.model, self.groups, self.seed, self.source = model, model.groups, seed, source
        self.config, self.device = model.config, model.runtime.device
        mixture = any(model.description.is_mixture(layer) for layer in range(self.config.num_layers))
        if mixture and self.groups.layout.tp > 1 and not self.config.sequence_parallel:
            raise ConfigError("a mixture of experts over several tensor-parallel ranks is trained with split sequences: add --sequence_parallel true")
        model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
        if model.lora is not None:
            self._let_gradients_into_frozen_blocks()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=optimizer.use_distributed_optimizer)
        self.chunks = [DistributedDataParallel(self.config, ddp, chunk, pg_collection=self.groups.collection) for chunk in model.chunks]
        if optimizer.use_distributed_optimizer:
            self._require_training_everywhere()
        self.optimizer = self._make_optimizer(optimizer)
        self.config.finalize_model_grads_func = self._finalize_gradients
        self._weight = torch.zeros((), dtype=torch.float64)
        self._schedule = get_forward_backward_func()

    def _let_gradients_into_frozen_blocks(self) -> None:
        """Recomputed blocks pass no gradient to their adapters unless their input asks for one, and nothing says so; a stage of the embedding
        alone has an output that a backward pass can begin at only then."""

        def ask(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output.requires_grad_() if output.is_leaf else output

        for chunk in self.model.chunks:
            if chunk.pre_process and (self.config.recompute_granularity == "full" or not chunk.decoder.layers):
                chunk.embedding.register_forward_hook(ask)

    def _require_training_everywhere(self) -> None:
        """megatron's distributed optimizer cannot save a rank that has no state. Collective."""
        fewest = torch.tensor(len(self.trained_elements()), device=self.device)
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
        if not fewest:
            raise ConfigError("--use_distributed_optimizer true with a pipeline stage that trains nothing; make it false, or give every stage layers")

    def _make_optimizer(self, settings: OptimizerSettings) -> Any:
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.max_grad_norm or float("inf"),
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=settings.use_distributed_optimizer,
        )
        optimizer = get_megatron_optimizer(config, self.chunks, use_gloo_process_groups=True, pg_collection=None)
        for group in optimizer.param_groups:
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        return optimizer

    def train_step(self, batches: Sequence[MicroBatch], objective: Objective, *, step: int, learning_rate: float) -> StepResult:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        figures = self._run(batches, objective, step=step, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        total, weight = self._sum_over_world(figures)
        return StepResult(loss=total / max(weight, 1e-12), weight=weight, grad_norm=float(grad_norm))

    def evaluate(self, batches: Sequence[MicroBatch], objective: Objective) -> tuple[float, float]:
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            figures = self._run(batches, objective, step=0, forward_only=True)
        return self._sum_over_world(figures)

    def _run(self, batches: Sequence[MicroBatch], objective: Objective, *, step: int, forward_only: bool) -> list[dict[str, Tensor]]:
        """Forward (and backward) over the micro batches; what the objective said of each, on the last pipeline stage."""
        self._weight = torch.zeros((), dtype=torch.float64, device=self.device)
        iterators: Any = [iter(batches) for _ in self.chunks]

        def forward_step(batch_iterator: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
            whole = next(batch_iterator).to(self.device)
            batch, width = self._share(whole), whole.input_ids.shape[1]
            torch.manual_seed(micro_batch_seed(self.seed, step, batch.index * self.groups.layout.cp + self.groups.coords.cp))
            packed = None if batch.cu_seqlens is None else packed_rows(batch.cu_seqlens, self.device)
            output = model(
                batch.input_ids, batch.position_ids, None, labels=batch.labels, packed_seq_params=packed, rotary_length=width, loss_mask=batch.weights
            )
            return output, functools.partial(self._loss, batch, objective)

        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=max(batch.input_ids.shape[1] for batch in batches),
            micro_batch_size=batches[0].input_ids.shape[0],
            forward_only=forward_only,
        )

    def _share(self, batch: MicroBatch) -> MicroBatch:
        """This context-parallel rank's tokens."""
        layout = self.groups.layout
        return batch.share(self.groups.coords.cp, layout.cp, layout.tp if self.config.sequence_parallel else 1)

    def _loss(self, batch: MicroBatch, objective: Objective, log_probs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out = objective.loss(Outputs(log_probs=log_probs), batch)
        self._weight += out.weight.detach()
        # The count that megatron-core would divide by is an integer; ours may be fractional, so the division is in _finalize_gradients.
        return out.total, torch.ones((), dtype=torch.int), {"total": out.total.detach(), "weight": out.weight.detach()}

    def _finalize_gradients(self, chunks: list[Any], _num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Sum the gradients over the ranks, then divide once by the weight of the global batch."""
        finalize_model_grads(chunks, None, **kwargs)
        self._sum_shared_adapter_factors()
        weight = self._weight.clone()
        dist.all_reduce(weight, group=self.groups.pp)  # only the last stage has seen it
        dist.all_reduce(weight, group=self.groups.collection.dp_cp)
        if weight > 0:
            for chunk in chunks:
                chunk.scale_gradients(1.0 / float(weight))

    def _sum_shared_adapter_factors(self) -> None:
        """One sum over the ranks that share a weight for all adapters, in fp32, in place of two small ones in every layer's backward pass."""
        parts: dict[dist.ProcessGroup, list[Tensor]] = {}
        for chunk in self.model.chunks:
            for _, module in lora_modules(chunk):
                if module.group.size() > 1:
                    parts.setdefault(module.group, []).extend(factor.main_grad for factor in module.shared_factors)  # type: ignore[attr-defined]
        for group, shared in parts.items():
            if shared:
                flat = torch.cat([part.reshape(-1) for part in shared])
                dist.all_reduce(flat, group=group)
                for part, whole in zip(shared, flat.split([part.numel() for part in shared])):
                    part.copy_(whole.view_as(part))

    def _sum_over_world(self, figures: list[dict[str, Tensor]]) -> tuple[float, float]:
        """(total, weight) over the global batch: the last stage of each data- and context-parallel rank counts once."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.groups.is_last_stage and self.groups.coords.tp == 0:
            for figure in figures:
                sums += torch.stack((figure["total"].double(), figure["weight"].double()))
        dist.all_reduce(sums)
        return float(sums[0]), float(sums[1])

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        if loading:
            self._create_optimizer_state()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        metadata |= layers_alone(self.model)
        weights = {str(number): self._trained_weights(chunk, metadata) for number, chunk in enumerate(self.model.chunks)}
        state = self.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
        if not loading:
            self._tell_step(state)
        return {"model": weights, "optimizer": state}

    def _tell_step(self, state: dict[Any, Any]) -> None:
        """megatron saves the step that rank 0 counts, which counts none if its stage trains nothing. Collective."""
        steps = [float(entry["step"]) for optimizer in self._torch_optimizers() for entry in optimizer.state.values()]
        step = torch.tensor(max(steps, default=0.0), device=self.device)
        dist.all_reduce(step, dist.ReduceOp.MAX)
        if steps or not step:
            return
        for part in state.values() if all(isinstance(key, int) for key in state) else (state,):
            part.get("optimizer", part).get("state", {}).setdefault("common_step", step.cpu())

    def _trained_weights(self, chunk: CausalLM, metadata: dict[str, Any]) -> dict[str, Any]:
        """megatron's description of what is trained in one chunk, by local name; the wrapped layers of adapters go by the layer's own."""
        trained = {name.replace(".base_layer.", ".") for name, parameter in chunk.named_parameters() if parameter.requires_grad}
        return {
            name: tensor for name, tensor in chunk.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(metadata)).items() if name in trained
        }

    def _torch_optimizers(self) -> list[torch.optim.Optimizer]:
        chained = self.optimizer.chained_optimizers
        return [part.optimizer for part in chained if part.optimizer is not None]

    def _create_optimizer_state(self) -> None:
        """torch's AdamW makes its state at the first step; a state to be loaded must be there before."""
        for optimizer in self._torch_optimizers():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if not optimizer.state[parameter]:
                        state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                        optimizer.state[parameter].update(step=torch.tensor(0.0), **state)

    def load_state(self, state: dict[str, Any]) -> None:
        optimizer_state = in_wanted_form(state["optimizer"], self._torch_optimizers())
        for number, chunk in enumerate(self.model.chunks):
            own = dict(chunk.named_parameters())
            with torch.no_grad():
                for name, tensor in state["model"][str(number)].items():
                    own[name].copy_(tensor)
        with torch.no_grad():
            self.optimizer.load_state_dict(optimizer_state)
        for optimizer in self._torch_optimizers():
            for entry in optimizer.state.values():
                # All parameters come back sharing one step tensor, which would then advance once per parameter.
                entry["step"] = torch.as_tensor(entry["step"]).clone()

    def export_adapter(self, directory: Path) -> None:
        self.model.export_adapter(directory, base_model=self.source)

    def export_merged(self, directory: Path, *, max_shard_size: str) -> None:
        self.model.export_merged(directory, max_shard_size=max_shard_size)

    def memory_bytes(self) -> int:
        return self.model.runtime.memory_bytes()

    def trained_elements(self) -> list[int]:
        return [parameter.numel() for chunk in self.chunks for parameter in chunk.parameters() if parameter.requires_grad]

    def parameter_counts(self) -> tuple[int, int]:
        """(trained, all) parameters of the whole model, each counted once however many ranks hold it."""
        layout = self.groups.layout
        copies = {"tp": layout.dp * layout.cp, "etp": layout.expert_replicas}
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for chunk in self.model.chunks:
            for name, parameter in chunk.named_parameters():
                copy = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
                copy = copy or (name == "embedding.word_embeddings.weight" and not chunk.pre_process)  # of layers that predict further ahead
                shard = shard_of(parameter, self.groups)
                if copy or (shard.dim is None and shard.rank > 0):
                    continue
                counts += torch.tensor([parameter.numel() * parameter.requires_grad, parameter.numel()]) / copies[shard.axis]
        dist.all_reduce(counts)
        return round(float(counts[0])), round(float(counts[1]))

    def trained_fingerprint(self) -> str:
        """SHA-256 over the names and whole shapes of the trained tensors of all stages; the same in every layout."""
        own = sorted(
            (global_name(chunk, name), shard_of(parameter, self.groups).whole_shape(parameter.shape))
            for chunk in self.model.chunks
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        )
        gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
        return hashlib.sha256(repr(sorted({entry for part in gathered for entry in part})).encode()).hexdigest()
