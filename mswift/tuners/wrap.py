"""Adapters on what is no parallel linear (embedding, router, gate of a shared expert), and the wrapping of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region, reduce_scatter_to_sequence_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from mswift.families.modules import GroupedExperts, SharedExperts
from mswift.kernels.lora_linear import dropout_of
from mswift.runtime.precision import widen
from mswift.tuners.experts import AdaptedExpertLayers
from mswift.tuners.lora import Adapter, LoraHead, LoraLinear, LoraSettings, magnitude_factor
from mswift.tuners.targets import GATE_WEIGHT, HEAD, check_dora, kind_of


class LoraEmbedding(Adapter):
    """The embedding plus ``scale * B A``: B ``[vocabulary / tp, r]`` is looked up as the weight is, A ``[r, hidden]`` is replicated.

    In peft these are ``lora_embedding_A`` (our B, transposed, zero at first) and ``lora_embedding_B`` (our A); there is no dropout.
    """

    base_layer: VocabParallelEmbedding
    by_columns = True

    def __init__(self, base: VocabParallelEmbedding, name: str, settings: LoraSettings) -> None:
        super().__init__(base, base.weight, name, settings, "column", group=base.tp_group)

    @property
    def weight(self) -> Tensor:
        """The base's, which is the head of a tied model."""
        return self.base_weight

    def _first_values(self, settings: LoraSettings, generator: torch.Generator) -> Tensor:
        return torch.empty(settings.rank, self.width).normal_(generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ``[b, s]`` -> ``[b, s, hidden]``, or this rank's part of ``[s, b, hidden]`` where sequences are split."""
        base = self.base_layer
        foreign = (ids < base.vocab_start_index) | (ids >= base.vocab_end_index)
        rows = (ids - base.vocab_start_index).masked_fill(foreign, 0)
        added = torch.matmul(widen(nn.functional.embedding(rows, self.lora_b)), widen(self.lora_a)) * self.scale
        output = nn.functional.embedding(rows, base.weight) + added
        if self.lora_magnitude is not None:
            output = output * magnitude_factor(self.lora_magnitude, self.norms())
        output = output.to(base.weight.dtype).masked_fill(foreign[..., None], 0.0)
        if base.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(output.transpose(0, 1).contiguous(), group=self.group)
        return reduce_from_tensor_model_parallel_region(output, group=self.group)


class _Scores(Adapter):
    """An adapter on a small weight that every rank holds whole and applies to its own tokens, in fp32."""

    def __init__(self, base: nn.Module | None, weight: Tensor, name: str, settings: LoraSettings, config: Any, group: Any) -> None:
        super().__init__(base, weight, name, settings, "whole", group=group)
        self.split_sequences = config.sequence_parallel and group.size() > 1
        for factor in self.factors.values():  # its gradient is summed over the ranks that share a sequence, as that of the weight
            factor.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def added(self, x: Tensor) -> Tensor:
        """What the adapter adds for `x` ``[s here, b, in]``, fp32: ``scale * B A x``; with DoRA all of it, and the base, takes the magnitude."""
        flat = x.reshape(-1, x.shape[-1])
        if self.training and self.dropout > 0:
            first = self.group.rank() * len(flat) if self.split_sequences else 0  # in the whole sequence: the mask does not depend on the layout
            flat = dropout_of(flat, self.dropout, self.seed(), first_row=first)
        scores = (flat.float() @ self.lora_a.float().t()) @ self.lora_b.float().t() * self.scale
        if self.lora_magnitude is not None:
            factor = magnitude_factor(self.lora_magnitude, self.norms())
            scores = factor * scores + (factor - 1.0) * (flat.float() @ self.base_weight.float().t())
        return scores.view(*x.shape[:-1], -1)


class LoraRouter(_Scores):
    """A router whose logits are those of an adapted weight."""

    base_layer: TopKRouter

    def __init__(self, base: TopKRouter, name: str, settings: LoraSettings) -> None:
        super().__init__(base, base.weight, name, settings, base.config, base.tp_group)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states ``[s, b, hidden]`` -> (weights, bool map of the chosen), as the router."""
        router = self.base_layer
        logits = router.gating(router.apply_input_jitter(x))
        return router.routing(logits + self.added(x).to(logits.dtype), padding_mask=padding_mask)


class LoraGate(_Scores):
    """An adapter on the weight that says how much of a shared expert each token gets; it stands beside the weight, which is no module."""

    def __init__(self, experts: SharedExperts, name: str, settings: LoraSettings) -> None:
        super().__init__(None, experts.gate_weight, name, settings, experts.config, experts.tp_group)
        self.weights = [experts.gate_weight]  # in a list: else it would be a parameter of two modules

    @property
    def base_weight(self) -> Tensor:
        return self.weights[0]

    @property
    def weight_name(self) -> str:
        return self.module_name

    def forward(self, x: Tensor) -> Tensor:
        """``[s here, b, hidden]`` -> what is added to the logits, fp32 ``[s here, b, 1]``."""
        return self.added(x)


def add_lora(
    model: nn.Module, settings: LoraSettings, global_name: Callable[[str], str], width: Callable[[str], int | None] = lambda _name: None
) -> list[str]:
    """Freeze `model` and wrap its target layers.

    Args:
        global_name: maps a local module name to the name over all pipeline stages. width: real input columns by global name; None: all.

    Returns:
        Global names of the wrapped modules.

    Raises:
        ConfigError: DoRA on modules that have none.
    """
    model.requires_grad_(False)
    wrapped = []

    def wanted(name: str) -> bool:
        further_ahead = name.startswith("mtp.")  # peft knows no such layers
        return not further_ahead and kind_of(name) in settings.targets and (settings.modules is None or name in settings.modules)

    for name, module in list(model.named_modules()):
        whole_name, gate_name = global_name(name), f"{global_name(name)}.{GATE_WEIGHT}"
        if isinstance(module, SharedExperts) and module.use_shared_expert_gate and wanted(gate_name):
            module.gate_adapter = LoraGate(module, gate_name, settings)
            wrapped.append(gate_name)
        if isinstance(module, GroupedExperts):
            module.layers = AdaptedExpertLayers()
        adapter = _adapter(module, whole_name, settings, width) if wanted(whole_name) else None
        if adapter is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, adapter)
            if isinstance(adapter, LoraHead):
                model.head_adapter = adapter.extend  # type: ignore[assignment]
            wrapped.append(whole_name)
    check_dora(dict.fromkeys(map(kind_of, wrapped)), settings.use_dora)
    return wrapped


def _adapter(module: nn.Module, name: str, settings: LoraSettings, width: Callable[[str], int | None]) -> Adapter | None:
    if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight is not None:
        return (LoraHead if kind_of(name) == HEAD else LoraLinear)(module, name, settings, width(name))
    if isinstance(module, VocabParallelEmbedding):
        return LoraEmbedding(module, name, settings)
    return LoraRouter(module, name, settings) if isinstance(module, TopKRouter) else None
