"""Adapters of all experts of a rank together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mswift.families.modules.experts import ExpertLayers, Linear
from mswift.kernels.grouped_linear import lora_grouped_linear
from mswift.tuners.lora import LoraLinear


class AdaptedExpertLayers(ExpertLayers):
    """Linear layers of experts, all of which have an adapter, or none of which has one."""

    def base(self, module: nn.Module) -> Linear:
        return module.base_layer if isinstance(module, LoraLinear) else super().base(module)

    def product(self, modules: Sequence[nn.Module], x: Tensor, counts: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
        adapters = [module for module in modules if isinstance(module, LoraLinear)]
        if len(adapters) < len(modules):
            assert not adapters, "where one expert of a layer is adapted, all are"
            return super().product(modules, x, counts, biases)
        first, row = adapters[0], adapters[0].kind == "row"
        return lora_grouped_linear(
            x,
            [adapter.base_weight for adapter in adapters],
            counts,
            biases,
            [adapter.lora_a for adapter in adapters],
            [adapter.lora_b for adapter in adapters],
            scale=first.scale,
            dropout_p=first.dropout if first.training else 0.0,
            seeds=torch.tensor([adapter.seed() for adapter in adapters]),
            first_column=x.shape[-1] * first.group.rank() if row else 0,
            full_width=first.width if row else None,
        )
