"""Adapters of all experts of a rank together, and quantised weights of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mswift.families.modules.experts import ExpertLayers, Linear
from mswift.kernels.grouped_linear import lora_grouped_linear
from mswift.kernels.quantised_linear import QuantisedWeight, quantised_linear
from mswift.tuners.lora import LoraLinear
from mswift.tuners.quantised import QuantisedLinear


class AdaptedExpertLayers(ExpertLayers):
    """Linear layers of experts, all of which have an adapter, or none of which has one; quantised or not."""

    def base(self, module: nn.Module) -> Linear:
        return module.base_layer if isinstance(module, LoraLinear | QuantisedLinear) else super().base(module)

    def product(self, modules: Sequence[nn.Module], x: Tensor, counts: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
        packed = [module.packed for module in modules if isinstance(module, LoraLinear | QuantisedLinear) and module.packed is not None]
        adapters = [module for module in modules if isinstance(module, LoraLinear)]
        assert len(adapters) in (0, len(modules)), "where one expert of a layer is adapted, all are"
        if packed:
            return _in_turn(packed, x, counts, biases, adapters)
        if not adapters:
            return super().product(modules, x, counts, biases)
        common = adapters[0].adapter_of(x)
        common["seeds"] = torch.tensor([adapter.seed() for adapter in adapters])
        del common["seed"]
        weights, a, b = zip(*((adapter.base_weight, adapter.lora_a, adapter.lora_b) for adapter in adapters))
        return lora_grouped_linear(x, weights, counts, biases, a, b, **common)


def _in_turn(packed: Sequence[QuantisedWeight], x: Tensor, counts: Tensor, biases: Sequence[Tensor] | None, adapters: Sequence[LoraLinear]) -> Tensor:
    """One expert after the other: what is quantised is there to be small."""
    outputs = []
    for expert, rows in enumerate(x.split(counts.tolist())):
        adapter = {}
        if adapters:
            adapter = {"lora_a": adapters[expert].lora_a, "lora_b": adapters[expert].lora_b, **adapters[expert].adapter_of(x)}
        outputs.append(quantised_linear(rows, packed[expert], None if biases is None else biases[expert], **adapter))
    return torch.cat(outputs)
