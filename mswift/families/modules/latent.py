"""Multi-head latent attention over tensor-parallel ranks; megatron-core's own asks for Transformer Engine, and its local form is not exact there.

The narrow layers are split over the ranks and their outputs joined. Of the joined output every rank's heads use the rotated columns of the
keys, so their gradient is a sum over the ranks, which megatron-core's module leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from mswift.families.base import AttentionStyle
from mswift.families.modules.attention import RotatedAttention


class LatentAttention(RotatedAttention):
    """Latent attention whose parameters have the names of megatron-core's ``MLASelfAttention``; its cache holds the keys and values of heads.

    Args:
        config: ``kv_channels`` is the width of a head of values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *,
        style: AttentionStyle,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", style=style, **kwargs)
        latent = style.latent
        assert latent is not None
        self.latent, heads = latent, config.num_attention_heads
        self.key_hidden_size = latent.plain + latent.rotated
        self.q_layernorm: nn.Module | None = None
        self.k_layernorm = None  # of heads: the stock forward pass looks for one
        if latent.q_rank is None:
            self.linear_q_proj = self._linear(submodules.linear_q_proj, config.hidden_size, heads * self.key_hidden_size)
        else:
            self.linear_q_down_proj = self._linear(submodules.linear_q_down_proj, config.hidden_size, latent.q_rank, bias=latent.bias)
            self.linear_q_up_proj = self._linear(submodules.linear_q_up_proj, latent.q_rank, heads * self.key_hidden_size)
            self.q_layernorm = build_module(submodules.q_layernorm, hidden_size=latent.q_rank, config=config, eps=latent.epsilon)
        narrow = latent.kv_rank + latent.rotated
        self.linear_kv_down_proj = self._linear(submodules.linear_kv_down_proj, config.hidden_size, narrow, bias=latent.bias)
        self.linear_kv_up_proj = self._linear(submodules.linear_kv_up_proj, latent.kv_rank, heads * (latent.plain + latent.values))
        self.kv_layernorm = build_module(submodules.kv_layernorm, hidden_size=latent.kv_rank, config=config, eps=latent.epsilon)

    def _linear(self, kind: type, inputs: int, outputs: int, *, bias: bool = False) -> nn.Module:
        common = {"config": self.config, "init_method": self.config.init_method, "tp_group": self.tp_group}
        return build_module(kind, inputs, outputs, gather_output=False, bias=bias, skip_bias_add=False, is_expert=False, **common)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's heads, rotated columns in front.

        Args:
            hidden_states: ``[s, b, hidden]``, a part of the sequence under sequence parallelism.

        Returns:
            ``[s, b, heads, rotated + plain]`` twice and ``[s, b, heads, values]``, of the whole sequence.
        """
        latent = self.latent
        query = self._queries(hidden_states).unflatten(-1, (-1, self.key_hidden_size))
        compressed, rotated = self._joined(self.linear_kv_down_proj, hidden_states).split([latent.kv_rank, latent.rotated], dim=-1)
        pairs = self._widened(self.linear_kv_up_proj, self.kv_layernorm, compressed).unflatten(-1, (-1, latent.plain + latent.values))
        plain, value = pairs.split([latent.plain, latent.values], dim=-1)
        rotated = copy_to_tensor_model_parallel_region(rotated, group=self.tp_group)
        key = torch.cat((rotated[:, :, None].expand(*plain.shape[:-1], -1), plain), dim=-1)
        return torch.cat((query[..., latent.plain :], query[..., : latent.plain]), dim=-1), key, value

    def _queries(self, hidden_states: Tensor) -> Tensor:
        if self.latent.q_rank is None:
            return self.linear_q_proj(hidden_states)[0]
        return self._widened(self.linear_q_up_proj, self.q_layernorm, self._joined(self.linear_q_down_proj, hidden_states))

    def _joined(self, linear: nn.Module, hidden_states: Tensor) -> Tensor:
        """All columns of a narrow layer, of the whole sequence, on every rank."""
        return gather_from_tensor_model_parallel_region(linear(hidden_states)[0], group=self.tp_group)

    def _widened(self, linear: nn.Module, norm: nn.Module | None, narrow: Tensor) -> Tensor:
        """A narrow vector as this rank's heads; its norm is computed on a part of the sequence where the sequence is split."""
        assert norm is not None
        if self.config.sequence_parallel:
            narrow = scatter_to_sequence_parallel_region(narrow, group=self.tp_group)
        return linear(norm(narrow))[0]
