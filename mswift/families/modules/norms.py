"""Norms: root-mean-square and centred, with the weight stored around one or around zero, over a vector, a head, or all heads of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from mswift.families.base import NormStyle
from mswift.kernels.elementwise import rms_norm


class Norm(nn.Module):
    """A norm over the last dim, computed in fp32 and rounded once; unlike the stock local norm it works under sequence parallelism.

    Args:
        style: kind, and how the weight is stored; None: root mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, style: NormStyle | None = None, **_: Any) -> None:
        super().__init__()
        self.eps, self.style = eps, style or NormStyle()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) if self.style.bias else None
        for parameter in self.parameters():
            # megatron sums the gradient of such a parameter over the tensor-parallel ranks: each saw its part of the sequence
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states` ``[..., hidden]`` -> the same shape and dtype."""
        if self.style.kind == "rms":
            return rms_norm(hidden_states, self.weight, self.eps, zero_centred=self.style.zero_centred)
        x: Tensor = hidden_states
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.style.zero_centred:  # 1 + weight does not fit into bf16
            x, weight, bias = x.float(), 1.0 + weight.float(), None if bias is None else bias.float()
        return F.layer_norm(x, weight.shape, weight, bias, self.eps).to(hidden_states.dtype)


class HeadNorm(nn.Module):
    """A norm of queries or keys whose weight differs from head to head.

    The weight is held whole on every rank, which uses the rows of its own heads; megatron sums its gradient over the ranks.

    Args:
        heads: of the whole layer, those added as padding included. real_heads: without them. first: first head on this rank.
        copies: ranks that hold the same heads (fewer key heads than ranks). style: ``own`` (statistics of each head by itself) or ``full``
            (over all heads of all ranks of `group`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        heads: int,
        real_heads: int,
        first: int,
        copies: int,
        style: str,
        norm: NormStyle,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.eps, self.head_dim = config.layernorm_epsilon, config.kv_channels or 0
        self.first, self.copies, self.real_width, self.full = first, copies, real_heads * self.head_dim, style == "full"
        self.norm, self.group = norm, group
        shape = (heads * self.head_dim,) if self.full else (heads, self.head_dim)
        self.weight = nn.Parameter(torch.ones(shape, dtype=config.params_dtype))
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[s, b, heads on this rank, head dim]`` -> the same."""
        wide = x.float()
        weight = self.weight.view(-1, self.head_dim)[self.first : self.first + x.shape[2]].float()
        if self.full:
            square = wide.square().sum((-2, -1), keepdim=True)
            if self.group.size() > 1:
                square = all_reduce(square, group=self.group) / self.copies
            return (wide * torch.rsqrt(square / self.real_width + self.eps) * weight).to(x.dtype)
        if self.norm.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * weight).to(x.dtype)
