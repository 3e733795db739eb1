"""LoRA for megatron's parallel linears: `LoraLinear` wraps one and adds a low-rank term; the base weight is never written.

The parameters keep megatron's attributes (which dim is split over tensor-parallel ranks, which ranks share an expert), so that its optimizer,
its checkpoints and our converters treat them as they treat any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mswift.families.modules.layers import BlockedColumnParallelLinear, split_blocks
from mswift.families.modules.mixture import BiasedExpertRowLinear
from mswift.kernels.lora_linear import dropout_of, lora_linear
from mswift.kernels.quantised_linear import QuantisedWeight, quantised_linear
from mswift.runtime.precision import widen
from mswift.tuners.targets import ALL_LINEAR

Kind = Literal["column", "row", "whole"]
"""How a weight is split over tensor-parallel ranks: by rows (outputs), by columns (inputs), or not at all."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What an adapter is.

    Args:
        rank, alpha, use_rslora: the scale is `alpha` / r, or `alpha` / sqrt(r) for rsLoRA. dropout: rate on its input.
        targets: kinds of modules (`targets.ADAPTABLE`) that are wrapped. modules: None, or the names of all that are.
        use_dora: the rows of the adapted weight have magnitudes of their own (DoRA, arXiv 2402.09353).
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    use_rslora: bool = False
    targets: tuple[str, ...] = ALL_LINEAR
    seed: int = 42
    use_dora: bool = False
    modules: frozenset[str] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Adapter(nn.Module):
    """A frozen layer and the factors beside its weight; what all kinds of adapters have in common.

    DoRA's magnitudes are those of the rows of the weight; with `by_columns` those of its columns, as peft has them in an embedding.

    Args:
        base: the layer; frozen here. name: global name, from which the initial values and the dropout masks follow.
        group: the ranks that share the weight. spread: these hold experts of their own, which other tensor-parallel ranks do not have.
        width: input columns of the whole layer that are real; the rest are padded heads, where A stays zero. None: all.
    """

    by_columns: ClassVar[bool] = False

    def __init__(
        self,
        base: nn.Module | None,
        weight: Tensor,
        name: str,
        settings: LoraSettings,
        kind: Kind,
        *,
        group: dist.ProcessGroup,
        spread: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer, self.kind, self.scale, self.dropout, self.group = base, kind, settings.scale, settings.dropout, group
        self.tag = sum(ord(letter) * 131**i for i, letter in enumerate(name)) % 2**31
        self.module_name = name
        if base is not None:
            base.requires_grad_(False)
        out_features, in_features = weight.shape
        self.width = width or in_features * (group.size() if kind == "row" else 1)
        self.lora_a = nn.Parameter(weight.new_empty(settings.rank, in_features))
        self.lora_b = nn.Parameter(weight.new_zeros(out_features, settings.rank))
        magnitudes = in_features if self.by_columns else out_features
        self.lora_magnitude = nn.Parameter(weight.new_ones(magnitudes)) if settings.use_dora else None
        self._mark(self.lora_a, 1 if kind == "row" else None, spread)
        self._mark(self.lora_b, 0 if kind == "column" else None, spread)
        if self.lora_magnitude is not None:
            self._mark(self.lora_magnitude, 0 if kind == "column" and not self.by_columns else None, spread)
        self._initialise(settings)

    @property
    def base_weight(self) -> Tensor:
        """The weight that is adapted, this rank's part."""
        assert self.base_layer is not None
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def weight_name(self) -> str:
        """Its name in the whole model."""
        return f"{self.module_name}.weight"

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        own = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        return own if self.lora_magnitude is None else {**own, "lora_magnitude": self.lora_magnitude}

    @property
    def shared_factors(self) -> list[nn.Parameter]:
        """The factors that every rank of the group holds whole, and whose gradient is a partial sum on each of them."""
        if self.kind == "column":
            return [factor for name, factor in self.factors.items() if name == "lora_a" or (name == "lora_magnitude" and self.by_columns)]
        return [factor for name, factor in self.factors.items() if name != "lora_a"] if self.kind == "row" else []

    def _mark(self, parameter: nn.Parameter, dim: int | None, spread: bool) -> None:
        """Say what megatron's optimizer and gradient buffers have to know: how it is split, which ranks add up, who counts it in the norm."""
        marked: Any = parameter
        marked.allreduce = not spread
        if dim is not None:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        elif spread:  # megatron would count it on the first of the dense ranks, each of which may have other experts
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            marked.whole, marked.shared = True, self.group.rank() > 0

    def _initialise(self, settings: LoraSettings) -> None:
        """Kaiming-uniform A (bound 1/sqrt(in), as PEFT), drawn whole from the layer's name and cut: the same values in every layout."""
        parts, part = (self.group.size(), self.group.rank()) if self.kind == "row" else (1, 0)
        whole = self._first_values(settings, torch.Generator().manual_seed(settings.seed * 1_000_003 + self.tag))
        whole = nn.functional.pad(whole, (0, self.lora_a.shape[1] * parts - self.width))
        with torch.no_grad():
            self.lora_a.copy_(whole.chunk(parts, 1)[part])

    def _first_values(self, settings: LoraSettings, generator: torch.Generator) -> Tensor:
        bound = 1.0 / math.sqrt(self.width)
        return torch.empty(settings.rank, self.width).uniform_(-bound, bound, generator=generator)

    def seed(self) -> int:
        """Of the dropout mask of this micro batch."""
        return (torch.initial_seed() * 31 + self.tag) % 2**62

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

    @torch.no_grad()
    def load_magnitude(self, values: Tensor) -> None:
        """Take DoRA's magnitudes, of which every rank holds all."""
        assert self.lora_magnitude is not None
        self.lora_magnitude.copy_(values)

    def _changed(self) -> Tensor:
        """``W + scale * B A`` in fp32."""
        return (self.lora_b.detach().float() @ self.lora_a.detach().float()).mul_(self.scale).add_(self.base_weight.detach())

    @torch.no_grad()
    def norms(self, *, exact: bool = False) -> Tensor:
        """fp32 norms of the whole rows, or columns, of ``W + scale * B A``. Collective where these are split.

        Args:
            exact: from the sum itself, not from the parts of its square.
        """
        if exact:
            squares = self._changed().square_().sum(0 if self.by_columns else 1)
        else:
            weight, a, b = self.base_weight.detach(), self.lora_a.detach(), self.lora_b.detach()
            weight, own, other = (weight.t(), a.t(), b.t()) if self.by_columns else (weight, b, a)
            crossed = torch.mm(widen(weight), widen(other).t()).float()
            own, other = own.float(), other.float()
            squares = self._squares() + (2 * self.scale * crossed + self.scale**2 * (own @ (other @ other.t()))).mul_(own).sum(1)
        if self.kind == ("column" if self.by_columns else "row") and self.group.size() > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.clamp_(min=0.0).sqrt_()

    def _squares(self) -> Tensor:
        """Sums of the squares of this rank's part of each row, or column, of the base, which never changes."""
        if "base_squares" not in vars(self):
            squares = [rows.float().square().sum(0 if self.by_columns else 1) for rows in self.base_weight.detach().split(4096)]
            self.base_squares = torch.stack(squares).sum(0) if self.by_columns else torch.cat(squares)
        return self.base_squares

    @torch.no_grad()
    def start_magnitudes(self) -> None:
        """DoRA begins at the norms of the base. Collective where rows are split."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self.norms(exact=True))

    def prepare_merge(self) -> None:
        """What `merged_weight` needs of other ranks. Collective."""
        if self.lora_magnitude is not None:
            self.norms_to_merge = self.norms(exact=True)

    def merged_weight(self, base: Tensor | None = None) -> Tensor:
        """This rank's part of the adapted weight: computed in fp32, rounded once to the dtype of W. The base is not touched.

        Args:
            base: the weight, where the layer holds it quantised.
        """
        base = self.base_weight.detach() if base is None else base
        if self.lora_magnitude is not None:
            factor = magnitude_factor(self.lora_magnitude.detach(), self.norms_to_merge)
            return self._changed().mul_(factor if self.by_columns else factor[:, None]).to(base.dtype)
        delta = (self.lora_b.detach().float() @ self.lora_a.detach().float()).mul_(self.scale)
        return torch.where(delta == 0, base, (delta + base).to(base.dtype))  # a zero keeps its sign where nothing is added

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """megatron's description of the adapter and the base for dist_checkpointing; base names are as without an adapter."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        axes = {"column": {"lora_b": 0} | ({} if self.by_columns else {"lora_magnitude": 0}), "row": {"lora_a": 1}, "whole": {}}[self.kind]
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        sharded = make_sharded_tensors_for_checkpoint(self.factors, prefix, axes, sharded_offsets, **groups)
        layer: Any = self.base_layer
        base = {} if layer is None else layer.sharded_state_dict(prefix, sharded_offsets, metadata)
        return {**base, **sharded}


def magnitude_factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    """fp32 factor of each row or column; 1 for those of zeros, which are padding."""
    return torch.where(norms > 0, magnitude.float() / norms.clamp(min=1e-30), torch.ones_like(norms))


def layer_output(
    base: ColumnParallelLinear | RowParallelLinear, group: dist.ProcessGroup, x: Tensor, product: Callable[..., Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What a megatron parallel linear returns (output, and a bias that is to be added later), its own product replaced.

    Args:
        product: (x, bias, ranks over which the gradient of x is summed or None, whether each of these has its part of the tokens) -> output of
            this rank's part of the weight.
    """
    alone = base.explicit_expert_comm
    if isinstance(base, ColumnParallelLinear):
        bias = None if base.skip_bias_add else base.bias
        output = product(x, bias, None if alone else group, base.sequence_parallel and not alone)
        return output, base.bias if base.skip_bias_add else None
    output = product(x, None, None, False)
    if not alone:
        reduce = reduce_scatter_to_sequence_parallel_region if base.sequence_parallel else reduce_from_tensor_model_parallel_region
        output = reduce(output, group=group)
    if isinstance(base, BiasedExpertRowLinear):
        return base.share_bias(output)
    if base.skip_bias_add:
        return output, base.bias
    return (output if base.bias is None else output + base.bias), None


def quantised_product(
    packed: QuantisedWeight, x: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, gather: bool, **adapter: Any
) -> Tensor:
    """The `product` of `layer_output` with a quantised weight. adapter: arguments of `quantised_linear`."""
    if gather:
        x = gather_from_sequence_parallel_region(x, group=group)
    elif group is not None:
        x = copy_to_tensor_model_parallel_region(x, group=group)
    return quantised_linear(x, packed, bias, **adapter)


class LoraLinear(Adapter):
    """A megatron parallel linear plus ``scale * B A``; calls and returns like the linear that it wraps.

    Column-parallel base: A ``[r, in]`` replicated, B ``[out / tp, r]``. Row-parallel base: A ``[r, in / tp]``, B ``[out, r]`` replicated;
    its partial sums go through the base's own reduction, so that the adapter adds no communication to the forward pass. Inside experts nothing
    is sent at all: whoever brings tokens to an expert and back adds up the parts.
    """

    base_layer: ColumnParallelLinear | RowParallelLinear

    def __init__(self, base: ColumnParallelLinear | RowParallelLinear, name: str, settings: LoraSettings, width: int | None = None) -> None:
        kind: Kind = "column" if isinstance(base, ColumnParallelLinear) else "row"
        spread = base.is_expert and base.expert_parallel
        super().__init__(base, base.weight, name, settings, kind, group=base.tp_group, spread=spread, width=width)
        self.gated = base.config.gated_linear_unit and name.endswith("linear_fc1")
        self.packed: QuantisedWeight | None = None

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """`x` ``[s, b, in]`` -> (``[s, b, out]``, bias or None), as the wrapped layer."""
        return layer_output(self.base_layer, self.group, x, self._product)

    def adapter_of(self, x: Tensor) -> dict[str, Any]:
        """Scale and dropout mask, as arguments of the operators; `x` has this rank's columns of the input."""
        found: dict[str, Any] = {"scale": self.scale, "dropout_p": self.dropout if self.training else 0.0, "seed": self.seed()}
        return found | ({"first_column": x.shape[-1] * self.group.rank(), "full_width": self.width} if self.kind == "row" else {})

    def _product(self, x: Tensor, bias: Tensor | None, x_group: dist.ProcessGroup | None, gather: bool) -> Tensor:
        """This rank's part of the output of the adapted layer.

        Args:
            x_group: the gradient of `x` is summed over these ranks. gather: each of them has its part of the tokens, and gets that of the gradient.
        """
        if self.packed is not None:
            return quantised_product(self.packed, x, bias, x_group, gather, lora_a=self.lora_a, lora_b=self.lora_b, **self.adapter_of(x))
        weight, mask = self.base_weight, self.adapter_of(x)
        scale, p = mask.pop("scale"), mask.pop("dropout_p")
        factor = None if self.lora_magnitude is None else magnitude_factor(self.lora_magnitude, self.norms())
        common: dict[str, Any] = {"scale": scale, "factor": factor}
        if factor is None or p == 0.0:
            common |= {"dropout_p": p, "group": x_group, "sequence_parallel": gather, **mask}
            return lora_linear(x, weight, bias, self.lora_a, self.lora_b, **common)
        if gather:
            x = gather_from_sequence_parallel_region(x, group=self.group)
        elif x_group is not None:
            x = copy_to_tensor_model_parallel_region(x, group=x_group)
        kept = dropout_of(x, p, **mask)  # as peft: what dropout takes away passes the base alone
        return lora_linear(kept, weight, bias, self.lora_a, self.lora_b, **common) + nn.functional.linear(widen(x - kept), widen(weight)).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        alone = bool((metadata or {}).get("singleton_local_shards"))
        for name in ("lora_b", "lora_magnitude"):
            if name not in self.factors:
                continue
            if self.gated:  # gate and up are split over the ranks each by itself, as megatron does with the weight
                sharded[prefix + name] = apply_swiglu_sharded_factory(sharded[prefix + name], sharded_offsets, alone)
            if isinstance(self.base_layer, BlockedColumnParallelLinear):
                sharded = split_blocks(sharded, prefix + name, self.base_layer.blocks)
        return sharded


class LoraHead(LoraLinear):
    """The output layer with an adapter; what megatron-core and `CausalLM` read of the layer is the base's."""

    @property
    def weight(self) -> Tensor:
        return self.base_weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def sequence_parallel(self) -> bool:
        return self.base_layer.sequence_parallel

    def forward(self, x: Tensor, *_: Any, runtime_gather_output: bool | None = None, **__: Any) -> tuple[Tensor, Tensor | None]:
        """As the layer: gathered over the ranks where it is asked for."""
        output, bias = super().forward(x)
        gather = self.base_layer.gather_output if runtime_gather_output is None else runtime_gather_output
        return gather_from_tensor_model_parallel_region(output, group=self.group) if gather else output, bias

    def extend(self, hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[s, b, columns]`` and a weight ``[rows here, columns]`` whose product are the logits of the adapted head.

        The columns are those of the head, then r; with DoRA those of the head again between them, by how much the magnitude changes it.
        """
        kept = hidden_states
        if self.training and self.dropout > 0:
            kept = dropout_of(hidden_states, self.dropout, self.seed())
        down = torch.matmul(widen(kept), widen(self.lora_a).t()).mul(self.scale).to(hidden_states.dtype)
        if self.lora_magnitude is None:
            return torch.cat((hidden_states, down), dim=-1), torch.cat((weight, self.lora_b), dim=1)
        factor = magnitude_factor(self.lora_magnitude, self.norms())[:, None]
        changed = [(factor - 1.0).mul(weight).to(weight.dtype), (factor * self.lora_b).to(weight.dtype)]
        return torch.cat((hidden_states, kept, down), dim=-1), torch.cat((weight, *changed), dim=1)


def lora_modules(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(local name, module) of every adapter in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module
