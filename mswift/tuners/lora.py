"""LoRA for megatron's parallel linears: `LoraLinear` wraps one and adds a low-rank term; the base weight is never written.

The parameters keep megatron's attributes (which dim is split over tensor-parallel ranks), so that its optimizer, its checkpoints and our
converters treat them as they treat any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mswift.errors import ConfigError
from mswift.families.modules.layers import BlockedColumnParallelLinear, split_blocks
from mswift.kernels.lora_linear import lora_linear

ALL_LINEAR = (
    *("linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"),
    *("linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"),
)
"""Module names that ``all-linear`` stands for: every linear layer of a block; the embedding, the head and routed experts stay as they are."""
ROUTED = ".experts."
"""In the name of every module of a routed expert."""

HF_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "linear_q_proj": (("q_proj",),),
    "linear_q_down_proj": (("q_a_proj",),),
    "linear_q_up_proj": (("q_b_proj",),),
    "linear_kv_down_proj": (("kv_a_proj_with_mqa",),),
    "linear_kv_up_proj": (("kv_b_proj",),),
    "linear_qkv": (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "linear_proj": (("o_proj",),),
    "in_proj": (("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
    "out_proj": (("out_proj",),),
    "linear_fc1": (("gate_proj", "up_proj"), ("gate_up_proj",), ("c_fc",)),
    "linear_fc2": (("down_proj",), ("c_proj",)),
}
"""Megatron module -> the Hugging Face modules that it stands for, in each of the forms that families write them in."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What an adapter is: `rank` r, scale `alpha` / r (`alpha` / sqrt(r) for rsLoRA), dropout rate on its input, wrapped modules."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    use_rslora: bool = False
    targets: tuple[str, ...] = ALL_LINEAR
    seed: int = 42

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def resolve_targets(names: list[str] | tuple[str, ...], own: Collection[str]) -> tuple[str, ...]:
    """Megatron module names for ``all-linear``, Hugging Face names (``q_proj``) or megatron names (``linear_qkv``).

    Args:
        own: those of `ALL_LINEAR` that the model has.

    Raises:
        ConfigError: an unknown name, or a part of a fused layer without the other parts.
    """
    wanted = set(names)
    known_here = tuple(target for target in ALL_LINEAR if target in own)
    if wanted == {"all-linear"}:
        return known_here
    fused = {part: (target, set(parts)) for target in known_here for parts in HF_PARTS[target] for part in parts}
    found: set[str] = set()
    for name in wanted:
        target, parts = fused.get(name, (name, {name}))
        if target not in known_here:
            known = ", ".join(["all-linear", *fused, *known_here])
            raise ConfigError(f"--target_modules: got {name!r}, wanted one of {known}")
        found.add(target)
        missing = parts - wanted
        if missing and target not in wanted:
            raise ConfigError(
                f"--target_modules: {', '.join(sorted(wanted & parts))} is one layer with {', '.join(sorted(missing))} on the Megatron engine; "
                "name all of them"
            )
    return tuple(target for target in known_here if target in found)


class LoraLinear(nn.Module):
    """A megatron parallel linear plus ``scale * B A``; calls and returns like the linear that it wraps.

    Column-parallel base: A ``[r, in]`` replicated, B ``[out / tp, r]``. Row-parallel base: A ``[r, in / tp]``, B ``[out, r]`` replicated;
    its partial sums go through the base's own reduction, so that the adapter adds no communication to the forward pass.

    Args:
        base: the layer; frozen here. name: global name, from which the initial values and the dropout masks follow.
        width: input columns of the whole layer that are real; the rest are padded heads, where A stays zero. None: all.
    """

    def __init__(
        self,
        base: ColumnParallelLinear | RowParallelLinear,
        name: str,
        settings: LoraSettings,
        kind: Literal["column", "row"],
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer, self.kind, self.scale, self.dropout = base, kind, settings.scale, settings.dropout
        self.tag = sum(ord(letter) * 131**i for i, letter in enumerate(name)) % 2**31
        base.requires_grad_(False)
        out_features, in_features = base.weight.shape
        self.gated = base.config.gated_linear_unit and name.endswith("linear_fc1")
        self.width = width or in_features * (base.tp_group.size() if kind == "row" else 1)
        self.lora_a = nn.Parameter(base.weight.new_empty(settings.rank, in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(out_features, settings.rank))
        set_tensor_model_parallel_attributes(self.lora_b if kind == "column" else self.lora_a, True, 0 if kind == "column" else 1, 1)
        self._initialise(settings)

    @property
    def shared_factor(self) -> nn.Parameter:
        """The factor that every tensor-parallel rank holds whole, and whose gradient is a partial sum on each of them."""
        return self.lora_a if self.kind == "column" else self.lora_b

    def _initialise(self, settings: LoraSettings) -> None:
        """Kaiming-uniform A (bound 1/sqrt(in), as PEFT), drawn whole from the layer's name and cut: the same values in every layout."""
        group = self.base_layer.tp_group
        parts, part = (group.size(), group.rank()) if self.kind == "row" else (1, 0)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.tag)
        bound = 1.0 / math.sqrt(self.width)
        whole = torch.empty(settings.rank, self.width).uniform_(-bound, bound, generator=generator)
        whole = nn.functional.pad(whole, (0, self.lora_a.shape[1] * parts - self.width))
        with torch.no_grad():
            self.lora_a.copy_(whole.chunk(parts, 1)[part])

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """`x` ``[s, b, in]`` -> (``[s, b, out]``, bias or None), as the wrapped layer."""
        base = self.base_layer
        group = base.tp_group
        seed = (torch.initial_seed() * 31 + self.tag) % 2**62
        common: dict[str, Any] = {"scale": self.scale, "dropout_p": self.dropout if self.training else 0.0, "seed": seed}
        if self.kind == "column":
            if base.sequence_parallel:
                x = gather_from_sequence_parallel_region(x, group=group)
            bias = None if base.skip_bias_add else base.bias
            x_group = None if base.sequence_parallel else group  # the gather's backward pass adds the parts
            output = lora_linear(x, base.weight, bias, self.lora_a, self.lora_b, group=x_group, **common)
            return output, base.bias if base.skip_bias_add else None
        columns: dict[str, Any] = {"first_column": x.shape[-1] * group.rank(), "full_width": self.width}
        output = lora_linear(x, base.weight, None, self.lora_a, self.lora_b, **columns, **common)
        reduce = reduce_scatter_to_sequence_parallel_region if base.sequence_parallel else reduce_from_tensor_model_parallel_region
        output = reduce(output, group=group)
        if base.skip_bias_add:
            return output, base.bias
        return (output if base.bias is None else output + base.bias), None

    @torch.no_grad()
    def load(self, a: Tensor | None, b: Tensor | None) -> None:
        """Take this rank's factors A ``[r, in here]`` and B ``[out here, r]``; an r below the rank is padded with zeros.

        None for both makes the adapter do nothing.
        """
        if a is None or b is None:
            self.lora_b.zero_()
            return
        self.lora_a.zero_()[: a.shape[0]].copy_(a)
        self.lora_b.zero_()[:, : b.shape[1]].copy_(b)

    def merged_weight(self) -> Tensor:
        """This rank's part of ``W + scale * B A``: computed in fp32, rounded once to the dtype of W. The base is not touched."""
        delta = (self.lora_b.detach().float() @ self.lora_a.detach().float()).mul_(self.scale)
        base = self.base_layer.weight.detach()
        return torch.where(delta == 0, base, (delta + base).to(base.dtype))  # a zero keeps its sign where nothing is added

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """megatron's description of the adapter and the base for dist_checkpointing; base names are as without an adapter."""
        axes = {"lora_b": 0} if self.kind == "column" else {"lora_a": 1}
        own = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        sharded = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)
        if self.gated:  # gate and up are split over the ranks each by itself, as megatron does with the weight
            sharded[f"{prefix}lora_b"] = apply_swiglu_sharded_factory(sharded[f"{prefix}lora_b"], sharded_offsets)
        if isinstance(self.base_layer, BlockedColumnParallelLinear):
            sharded = split_blocks(sharded, f"{prefix}lora_b", self.base_layer.blocks)
        return {**self.base_layer.sharded_state_dict(prefix, sharded_offsets, metadata), **sharded}


def add_lora(
    model: nn.Module, settings: LoraSettings, global_name: Callable[[str], str], width: Callable[[str], int | None] = lambda _name: None
) -> list[str]:
    """Freeze `model` and wrap its target layers.

    Args:
        global_name: maps a local module name to the name over all pipeline stages. width: real input columns by global name; None: all.

    Returns:
        Global names of the wrapped modules.
    """
    model.requires_grad_(False)
    wrapped = []
    for name, module in list(model.named_modules()):
        parent_name, _, leaf = name.rpartition(".")
        if leaf not in settings.targets or ROUTED in name or not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        kind: Literal["column", "row"] = "column" if isinstance(module, ColumnParallelLinear) else "row"
        setattr(model.get_submodule(parent_name), leaf, LoraLinear(module, global_name(name), settings, kind, width(global_name(name))))
        wrapped.append(global_name(name))
    return wrapped


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(local name, module) of every adapter in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
