"""QLoRA: the frozen linear layers of an adapted model, their weights kept in 4 or 8 bits (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from mswift.kernels.quantised_linear import QuantisedWeight, largest_of_rows, nested, quantise_int8, quantise_nf4
from mswift.tuners.lora import LoraLinear, layer_output, quantised_product
from mswift.tuners.targets import ALL_LINEAR, kind_of

Linear: TypeAlias = ColumnParallelLinear | RowParallelLinear


@dataclass(frozen=True, slots=True)
class QuantSettings:
    """4 bits: nf4 in blocks of 64, their magnitudes in 8 bits where it is `double`; 8 bits: int8, one factor a row."""

    bits: int = 4
    double: bool = True

    def pack(self, weight: Tensor, columns_over: dist.ProcessGroup | None = None) -> QuantisedWeight:
        """`weight` in codes.

        Args:
            columns_over: ranks that share its columns; collective, so that rows have the same factor in every layout.
        """
        if self.bits == 8:
            largest = largest_of_rows(weight)
            if columns_over is not None and columns_over.size() > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=columns_over)
            return quantise_int8(weight, largest)
        packed = quantise_nf4(weight)
        if not self.double:
            return packed
        assert isinstance(packed.scales, Tensor)
        return QuantisedWeight(packed.codes, nested(packed.scales), packed.shape, packed.block)


class QuantisedLinear(nn.Module):
    """A frozen megatron parallel linear that is not adapted, its weight quantised; calls and returns like the layer that it wraps."""

    def __init__(self, base: Linear, packed: QuantisedWeight) -> None:
        super().__init__()
        self.base_layer, self.packed = base, packed

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """`x` ``[s, b, in]`` -> (``[s, b, out]``, bias or None)."""
        return layer_output(self.base_layer, self.base_layer.tp_group, x, functools.partial(quantised_product, self.packed))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        return self.base_layer.sharded_state_dict(prefix, sharded_offsets, metadata)


def quantise(
    model: nn.Module, settings: QuantSettings, global_name: Callable[[str], str], read: Callable[[str, Tensor], Tensor]
) -> dict[str, QuantisedWeight]:
    """Keep the weights of all linear layers of the blocks quantised; embedding, head, norms, routers stay as they are. Collective.

    What remains of a weight is a parameter without memory, so that names and shapes are those of the plain model.

    Args:
        global_name: maps a local module name to the name over all pipeline stages. read: (name of a weight, parameter) -> its values.

    Returns:
        What was quantised, by the weight's name.
    """
    found = {}
    for name, module in list(model.named_modules()):
        path = name.removesuffix(".base_layer")
        whole_name, (parent, _, leaf) = global_name(path), path.rpartition(".")
        if not (isinstance(module, Linear) and kind_of(whole_name) in ALL_LINEAR and _fits(module)) or path.startswith("mtp."):
            continue
        columns_over = module.tp_group if isinstance(module, RowParallelLinear) else None
        weight = f"{whole_name}.weight"
        found[weight] = settings.pack(read(weight, module.weight), columns_over)
        adapter = model.get_submodule(path)
        if isinstance(adapter, LoraLinear):
            adapter.packed = found[weight]
        else:
            setattr(model.get_submodule(parent), leaf, QuantisedLinear(module, found[weight]))
        module.weight = _without_memory(module.weight)
    return found


def _fits(module: Linear) -> bool:
    return module.weight is not None and module.weight.numel() % 2 == 0


def _without_memory(weight: nn.Parameter) -> nn.Parameter:
    """A parameter of this shape, with megatron's attributes."""
    empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    vars(empty).update(vars(weight))
    return empty
