"""Attention: grouped queries through torch's scaled_dot_product_attention, rotated before the cache, with the norms and limits that families add."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mswift.families.base import AttentionStyle
from mswift.families.modules.context import SharedSequence
from mswift.families.modules.norms import HeadNorm, Norm
from mswift.families.modules.packed import PackedRows
from mswift.kernels import causal_attention
from mswift.kernels.elementwise import rotate, rotate_
from mswift.kernels.packed_attention import packed_attention, written_out
from mswift.runtime.precision import widen


class SdpaAttention(MegatronModule):
    """Core attention by torch's scaled_dot_product_attention: causal, grouped queries, sliding windows, no stored score matrix."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        softcap: float | None = None,
        chunk_of_layer: tuple[int | None, ...] | None = None,
        sinks: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or config.softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window, self.softcap = _window_of_layer(config, layer_number), softcap
        self.chunk = None if chunk_of_layer is None else chunk_of_layer[layer_number - 1]
        self.softmax_offset = self._sinks(pg_collection.tp.size()) if sinks else None
        self.sequence = SharedSequence(None if pg_collection is None else pg_collection.cp)

    def _sinks(self, tp: int) -> nn.Parameter:
        """``[heads here]``, under the name that megatron's own core attention gives it."""
        like = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
        parameter = nn.Parameter(torch.zeros(self.config.num_attention_heads // tp, **like))
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """megatron's description of the sinks for dist_checkpointing."""
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Causal attention in which the last query stands at the last key.

        Args:
            query: ``[sq, b, heads, dim]`` or ``[sq, b, groups, heads of each, dim]``. key, value: ``[sk, b, groups, dim]``, sk >= sq.
            attention_mask: bool ``[b or 1, 1, sq, sk]``, True = hidden, on top of the causal mask; None: nothing more is hidden. Where attention
                goes by chunks, what is hidden from the last query is padding on the left, and chunks begin behind it.
            packed_seq_params: rows lie end to end; then the second dim of all three, b, is missing, and there is no mask.
                Over context-parallel ranks all three are this rank's share of the sequence, without a mask, and rows do not lie end to end.

        Returns:
            ``[sq, b, heads * dim]``, or ``[t, heads * dim]``.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q)
        if self.sequence.size == 1:
            return self._suffix(query, key, value, attention_mask)
        key, value = self.sequence.whole(torch.cat((key, value), dim=-1)).split([key.shape[-1], value.shape[-1]], dim=-1)
        size = query.shape[0] // 2
        ends = [(chunk + 1) * size for chunk in self.sequence.chunks]
        return torch.cat([self._suffix(part, key[:end], value[:end], None) for part, end in zip(query.chunk(2), ends)])

    def _suffix(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        sq, batch, sk, groups = *query.shape[:2], key.shape[0], key.shape[2]
        if attention_mask is None and sq == sk and causal_attention.usable(query, key, value, softcap=self.softcap, dropout_p=self._dropout):
            limits: dict[str, Any] = {"window": self.window, "chunk": self.chunk, "sinks": self.softmax_offset}
            return causal_attention.causal_attention(query, key, value, scale=self.scale, **limits).flatten(2)
        query = query.flatten(2, -2)
        heads = query.shape[2]
        q, k, v = (widen(t).permute(1, 2, 0, 3) for t in (query, key, value))
        # SDPA's own causal flag says all that there is to say of a plain square, and one query at the end sees everything
        plain = attention_mask is None and sk <= self._span(sk) and sq in (1, sk)
        if self.softcap is not None or self.softmax_offset is not None:
            seen = self._visible(sq, sk, attention_mask, query.device)
            out = written_out(q, k, v, seen, scale=self.scale, softcap=self.softcap, sinks=self.softmax_offset, dropout_p=self._dropout)
        else:
            visible = None if plain else self._visible(sq, sk, attention_mask, query.device)
            causal, gqa = plain and sq > 1, groups != heads
            out = F.scaled_dot_product_attention(q, k, v, visible, self._dropout, causal, scale=self.scale, enable_gqa=gqa)
        return out.permute(2, 0, 1, 3).reshape(sq, batch, -1).to(query.dtype)

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = (widen(part) for part in (query, key, value))
        limits: dict[str, Any] = {"window": self.window, "chunk": self.chunk, "softcap": self.softcap, "sinks": self.softmax_offset}
        return packed_attention(q, k, v, cu_seqlens, scale=self.scale, dropout_p=self._dropout, **limits).flatten(1).to(query.dtype)

    def _span(self, sk: int) -> int:
        """Keys that a query sees of `sk` at most, itself included."""
        return min(limit for limit in (sk, self.window, self.chunk) if limit is not None)

    def _visible(self, sq: int, sk: int, hidden: Tensor | None, device: torch.device) -> Tensor:
        """bool ``[sq, sk]``, or ``[b or 1, 1, sq, sk]`` where more is hidden: True = may look."""
        distance = torch.arange(sk - sq, sk, device=device)[:, None] - torch.arange(sk, device=device)
        visible = (distance >= 0) & (distance < self._span(sk))
        if self.chunk is not None:
            positions = torch.arange(sk, device=device)
            positions = positions if hidden is None else positions - hidden[:, :, -1].sum(-1, keepdim=True)
            chunks = positions.div(self.chunk, rounding_mode="floor")
            visible = visible & (chunks[..., sk - sq :, None] == chunks[..., None, :])
        return visible if hidden is None else visible & ~hidden


class RotatedAttention(Attention):
    """megatron's attention that rotates queries and keys by the layer's own rotation, before keys go into a cache (the stock one rotates the
    whole cache again for every new token), and has query factors that the stock one lacks.

    Args:
        style: what the family's attention does.
    """

    def __init__(self, config: TransformerConfig, *args: Any, style: AttentionStyle, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.style = style
        self.rotation = style.rotation_of_layer[self.layer_number - 1]
        self.has_factor = style.factor_of_layer is None or style.factor_of_layer[self.layer_number - 1]
        self._packed: PackedRows | None = None
        self._table: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As megatron's; what is said of packed rows and of positions is kept for the steps in the middle, which are not told of it."""
        self._packed = packed_seq_params
        has_table = rotary_pos_emb is not None and self.rotation is not None and kwargs.get("inference_context") is None
        self._table = rotary_pos_emb[self.rotation] if has_table else None
        both = {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
        return super().forward(hidden_states, attention_mask, *args, **both, **kwargs)

    @property
    def _early_table(self) -> Tensor | None:
        """By which queries and keys come rotated out of `get_query_key_value_tensors`; None: they do not."""
        return None

    def _rotated(self, heads: Tensor, table: Tensor) -> Tensor:
        """In place where `heads` are a result of their own, as a norm's are, and not a part of what a layer returned."""
        if heads._is_view() or not heads.is_contiguous():
            return rotate(heads, table, interleaved=self.style.interleaved)
        return rotate_(heads, table, width=heads.shape[-1], interleaved=self.style.interleaved)

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        start, padding = (0, None) if inference_context is None else (inference_context.sequence_len_offset, inference_context.left_padding)
        if rotary_pos_emb is not None and self.rotation is not None:
            if self._early_table is None:
                table = rotary_pos_emb[0][self.rotation, :, start : start + key.shape[0]]
                query, key = (self._rotated(part, table) for part in (query, key))
            if self.style.head_norm == "rotated":
                eps = self.config.layernorm_epsilon
                query, key = (F.rms_norm(part.float(), part.shape[-1:], eps=eps).to(part.dtype) for part in (query, key))
        if self.style.norm_last:
            query, key = self.rotated_q_layernorm(query), self.rotated_k_layernorm(key)
        if self.style.query_factor is not None and self.has_factor:
            here = self.core_attention.sequence.places(query.shape[0], query.device)
            positions = start + here if self._packed is None else self._packed.positions
            positions = positions[:, None]
            positions = positions if padding is None else (positions - padding).clamp(min=0)
            query = query.flatten(2, -2) * self.style.query_factor(positions).to(query.dtype)[:, :, None, None]
        return super()._adjust_key_value_for_inference(inference_context, query, key, value, None, *args, **kwargs)

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """`x` ``[s, b, heads on this rank * dim]`` times the sigmoid of `gate` ``[s, b, heads, dim]``; megatron gives the gates of a whole
        group where ranks share one, and would apply those of the first ranks everywhere."""
        heads = x.shape[-1] // gate.shape[-1]
        first = self.tp_group.rank() * heads % gate.shape[2]
        return (x * gate[:, :, first : first + heads].float().sigmoid().flatten(2)).to(x.dtype)


class DecoderAttention(RotatedAttention, SelfAttention):
    """Grouped queries from one projection, with norms that the stock attention lacks.

    Args:
        real_groups: key heads of the whole layer without those added as padding.
    """

    def __init__(self, config: TransformerConfig, *args: Any, style: AttentionStyle, real_groups: int, **kwargs: Any) -> None:
        super().__init__(config, *args, style=style, **kwargs)
        if style.norm_last:  # under names of their own: under the usual ones megatron would apply them before the rotation
            head_dim, eps = config.kv_channels or 0, config.layernorm_epsilon
            self.rotated_q_layernorm, self.rotated_k_layernorm = (Norm(config, head_dim, eps, style.norm) for _ in "qk")
        elif style.head_norm in ("own", "full"):
            per_group = config.num_attention_heads // config.num_query_groups
            copies = max(1, self.world_size // config.num_query_groups)
            rank, local = self.tp_group.rank(), config.num_attention_heads // self.world_size
            common: dict[str, Any] = {"style": style.head_norm, "norm": style.norm, "group": self.tp_group}
            self.q_layernorm = HeadNorm(
                config, heads=config.num_attention_heads, real_heads=real_groups * per_group, first=rank * local, copies=1, **common
            )
            groups = self.num_query_groups_per_partition
            first = rank // copies * groups
            self.k_layernorm = HeadNorm(config, heads=config.num_query_groups, real_heads=real_groups, first=first, copies=copies, **common)

    @property
    def _early_table(self) -> Tensor | None:
        """Where nothing stands between projection and rotation, no gate between queries and keys, and ranks do not share a group."""
        plain = self.q_layernorm is None and self.k_layernorm is None and not self.config.attention_output_gate
        return self._table if plain and self.config.num_query_groups >= self.world_size else None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As megatron's; where it can be, queries and keys are rotated where the projection wrote them.

        Returns:
            Views of it then: ``[s, b, groups, heads of each, dim]`` and twice ``[s, b, groups, dim]``.
        """
        table = self._early_table
        if table is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, _ = self.linear_qkv(hidden_states)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        each = mixed.shape[-1] // (groups * width)
        rotate_(mixed, table[:, : mixed.shape[0]], width=width, each=each, turned=each - 1, interleaved=self.style.interleaved)
        query, key, value = mixed.unflatten(-1, (groups, each, width)).split([each - 2, 1, 1], dim=3)
        return query, key[:, :, :, 0], value[:, :, :, 0]


def _window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a query sees, itself included; None where the layer (counted from 1) sees all before it."""
    if config.window_size is None:
        return None
    skip = config.window_attn_skip_freq
    full = layer_number % skip == 0 if isinstance(skip, int) else skip is not None and not skip[layer_number - 1]
    return None if full else config.window_size[0] + 1
