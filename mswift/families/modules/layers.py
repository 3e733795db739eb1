"""Blocks and linears: a residual addition with a norm or a factor, attention and MLP side by side, linears with a bias of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from mswift.families.base import NormStyle
from mswift.families.modules.norms import Norm


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear with a bias, whatever the configuration says of biases in general."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class BiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear with a bias, whatever the configuration says of biases in general."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class AddToResidual(nn.Module):
    """Where megatron adds a sublayer's output to the residual: normalised first, or times a factor.

    Args:
        norm: of the output; None: there is none. scale: factor on the output.
    """

    def __init__(self, config: TransformerConfig, norm: NormStyle | None, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = None if norm is None else Norm(config, config.hidden_size, config.layernorm_epsilon, norm)
        self.scale = scale

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The function ``(output, bias), residual, dropout rate -> sum`` that megatron asks its spec for."""
        return functools.partial(self._add, training)

    def _add(self, training: bool, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, rate: float) -> Tensor:
        output, bias = output_with_bias
        output = output if bias is None else output + bias
        output = output if self.norm is None else self.norm(output)
        output = output if self.scale == 1.0 else output * self.scale
        return residual + nn.functional.dropout(output, rate, training)


class ParallelBlock(TransformerLayer):
    """A block in which attention and MLP read the same normalised input and are added to the residual together."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        inference_context: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``[s, b, hidden]`` -> (``[s, b, hidden]``, None)."""
        normed = self.input_layernorm(hidden_states)
        attention = self.self_attention(normed, attention_mask=attention_mask, inference_context=inference_context, rotary_pos_emb=rotary_pos_emb)
        total = hidden_states
        for output, bias in (attention, self.mlp(normed)):
            total = total + (output if bias is None else output + bias)
        return total, None
