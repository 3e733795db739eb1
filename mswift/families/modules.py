"""Modules of ours that go into megatron-core's layer specs: what its own local ones lack, never a change to them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mswift.errors import ConfigError
from mswift.kernels.linear_log_probs import linear_log_probs
from mswift.runtime.precision import widen


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32, rounded once; unlike the stock local norm it works under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # megatron sums the gradient of such a parameter over the tensor-parallel ranks: each saw its part of the sequence
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states` ``[..., hidden]`` -> the same shape and dtype."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ConfigError(f"context parallelism {config.context_parallel_size} is not supported by the SDPA core attention; use 1")
        self.layer_number = layer_number
        self.scale = softmax_scale or config.softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = _window_of_layer(config, layer_number)

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
            query: ``[sq, b, heads, dim]``. key, value: ``[sk, b, groups, dim]``, sk >= sq.
            attention_mask: bool ``[b or 1, 1, sq, sk]``, True = hidden, on top of the causal mask; None: nothing more is hidden.

        Returns:
            ``[sq, b, heads * dim]``.
        """
        sq, batch, heads, _ = query.shape
        sk, _, groups, _ = key.shape
        q, k, v = (widen(t).permute(1, 2, 0, 3) for t in (query, key, value))
        visible = self._visible(sq, sk, attention_mask, query.device)
        causal = visible is None and sq > 1
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=p, is_causal=causal, scale=self.scale, enable_gqa=groups != heads)
        return out.permute(2, 0, 1, 3).reshape(sq, batch, -1).to(query.dtype)

    def _visible(self, sq: int, sk: int, hidden: Tensor | None, device: torch.device) -> Tensor | None:
        """The mask to give to SDPA (True = may look), or None where its own causal flag says the same."""
        window = sk if self.window is None else self.window
        windowed = sk > window
        if hidden is None and not windowed and (sq == sk or sq == 1):
            return None
        distance = torch.arange(sk - sq, sk, device=device)[:, None] - torch.arange(sk, device=device)
        visible = distance >= 0
        if windowed:
            visible &= distance < window
        return visible if hidden is None else visible & ~hidden


def _window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a query sees, itself included; None where the layer (counted from 1) sees all before it."""
    if config.window_size is None:
        return None
    skip = config.window_attn_skip_freq
    full = layer_number % skip == 0 if isinstance(skip, int) else skip is not None and not skip[layer_number - 1]
    return None if full else config.window_size[0] + 1


class RotatedCacheAttention(SelfAttention):
    """megatron's attention whose key-value cache holds keys after rotation; the stock one rotates the whole cache again for every new token."""

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
        if inference_context is not None and rotary_pos_emb is not None:
            start = inference_context.sequence_len_offset
            of_query, of_key = (table[start : start + key.shape[0]] for table in rotary_pos_emb)
            query = apply_rotary_pos_emb(query, of_query, config=self.config, cp_group=self.pg_collection.cp)
            key = apply_rotary_pos_emb(key, of_key, config=self.config, cp_group=self.pg_collection.cp)
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(inference_context, query, key, value, rotary_pos_emb, *args, **kwargs)


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear with a bias, whatever the configuration says of biases in general."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class BiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear with a bias, whatever the configuration says of biases in general."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class CausalLM(GPTModel):
    """megatron-core's GPTModel whose answer to labels is a log-probability per token, computed without storing logits."""

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size

    def output_weight(self) -> Tensor:
        """This rank's rows of the output head, ``[padded vocabulary / tp, hidden]``."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Log-probabilities fp32 ``[b, s]`` where labels are given, else what GPTModel returns."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        group = self.pg_collection.tp
        parallel_sequence = self.config.sequence_parallel and group.size() > 1
        if parallel_sequence:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        log_probs = linear_log_probs(
            hidden_states,
            self.output_weight(),
            labels.t(),
            vocab_size=self.true_vocab_size,
            group=group,
            reduce_grad=not parallel_sequence,  # the gather's backward pass adds the parts
        )
        return log_probs.t()
