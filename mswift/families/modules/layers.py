"""Blocks and linears: a residual addition with a norm or a factor, attention and MLP side by side, linears with a bias or blocks of rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
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


class BlockedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear whose rows are blocks of unequal size, each split over the ranks by itself.

    Args:
        blocks: rows of each block on this rank, by the name that megatron gives it in a checkpoint.
    """

    def __init__(self, *args: Any, blocks: dict[str, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocks = blocks

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        return split_blocks(super().sharded_state_dict(prefix, sharded_offsets, metadata), f"{prefix}weight", self.blocks)


def split_blocks(sharded: dict[str, Any], name: str, blocks: dict[str, int]) -> dict[str, Any]:
    """megatron's description of a checkpoint in which tensor `name` is saved block by block, so that another layout can read it."""
    whole = sharded[name]
    frame = whole.without_data()

    @torch.no_grad()
    def cut(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[Any]:
        full = replace(frame, key=key, data=data, dtype=data.dtype, replica_id=replica_id, flattened_range=flattened_range)
        ends = itertools.accumulate(blocks.values())
        parts = [full.narrow(0, end - rows, rows)[0] for end, rows in zip(ends, blocks.values())]
        return [replace(part, key=f"{key}.{block}") for part, block in zip(parts, blocks)]

    return {**sharded, name: ShardedTensorFactory(whole.key, whole.data, cut, torch.cat, whole.replica_id)}


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
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``[s, b, hidden]`` -> (``[s, b, hidden]``, None)."""
        normed = self.input_layernorm(hidden_states)
        handed_on = {"inference_context": inference_context, "rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
        attention = self.self_attention(normed, attention_mask=attention_mask, **handed_on)
        total = hidden_states
        for output, bias in (attention, self.mlp(normed)):
            total = total + (output if bias is None else output + bias)
        return total, None
