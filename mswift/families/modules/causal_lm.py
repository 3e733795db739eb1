"""megatron-core's GPTModel with what families put around its blocks: a factor on the embedding, a bias, a factor and a cap on the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor, nn

from mswift.families.base import MegatronDescription
from mswift.families.modules.packed import PackedRows
from mswift.kernels.linear_log_probs import linear_log_probs


class CausalLM(GPTModel):
    """megatron-core's GPTModel whose answer to labels is a log-probability per token, computed without storing logits."""

    def __init__(self, *args: Any, description: MegatronDescription, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.description = description
        self.head_adapter: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        if self.pre_process and description.embedding_scale != 1.0:
            self.embedding.register_forward_hook(self._scale_embedding)
        if self.post_process and description.head_bias:
            like: dict[str, Any] = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
            self.output_layer.bias = nn.Parameter(torch.empty(self.output_layer.output_size_per_partition, **like))
            set_tensor_model_parallel_attributes(self.output_layer.bias, True, 0, 1)

    def forward(
        self,
        *args: Any,
        inference_context: Any = None,
        packed_seq_params: PackedRows | None = None,
        rotary_length: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As GPTModel; in answering it is the prompt that decides which rotary frequencies hold, in packed rows each row, else `rotary_length`."""
        self.rotary_pos_emb.length = rotary_length if inference_context is None else inference_context.rotary_length
        self.rotary_pos_emb.packed = packed_seq_params
        return super().forward(*args, inference_context=inference_context, packed_seq_params=packed_seq_params, **kwargs)

    def _scale_embedding(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(self.description.embedding_scale, dtype=output.dtype, device=output.device)  # rounded as the families do

    def output_weight(self) -> Tensor:
        """This rank's rows of the output head, ``[padded vocabulary / tp, hidden]``."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Log-probabilities fp32 ``[b, s]`` where labels are given, else what GPTModel returns."""
        if labels is None or not self.post_process:
            output = super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
            return self._limit(output) if self.post_process else output
        group = self.pg_collection.tp
        parallel_sequence = self.config.sequence_parallel and group.size() > 1
        if parallel_sequence:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        weight = self.output_weight()
        if self.head_adapter is not None:  # further columns of the head, which meet what the adapter makes of the hidden states
            if not parallel_sequence:  # before them, since the gradient of what the ranks share is a partial sum on each
                hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
            hidden_states, weight = self.head_adapter(hidden_states, weight)
        scores = linear_log_probs(
            hidden_states,
            weight,
            labels.t(),
            bias=self.output_layer.bias if self.description.head_bias else None,
            vocab_size=self.description.vocab_size,
            logit_scale=self.description.logit_scale,
            softcap=self.description.logit_softcap,
            group=group,
            reduce_grad=not parallel_sequence and self.head_adapter is None,  # the gather's backward pass adds the parts
        )
        return scores.log_probs.t()

    def _limit(self, logits: Tensor) -> Tensor:
        scale, cap = self.description.logit_scale, self.description.logit_softcap
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap
