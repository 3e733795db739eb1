"""megatron-core's GPTModel with what families put around its blocks: a factor on the embedding, a bias, a factor and a cap on the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from torch import Tensor, nn

from mswift.families.base import MegatronDescription
from mswift.families.modules.packed import PackedRows
from mswift.kernels.linear_log_probs import IGNORE, linear_log_probs


class CausalLM(GPTModel):
    """megatron-core's GPTModel whose answer to labels is a log-probability per token, computed without storing logits."""

    def __init__(self, *args: Any, description: MegatronDescription, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.description = description
        self.head_adapter: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        if self.pre_process and description.embedding_scale != 1.0:
            self.embedding.register_forward_hook(self._scale_embedding)
        if self.post_process and not self.pre_process and description.built_further and description.tied:
            self.output_layer.weight = (
                None  # such a stage has the embedding, which is the head; megatron-core makes a second one that it does not use
            )
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

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        mtp_in_postprocess: bool | None = None,
        runtime_gather_output: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Log-probabilities fp32 ``[b, s]`` where labels are given, else what GPTModel returns.

        Args:
            loss_mask: how much each label counts; only layers that predict further ahead ask for it.
        """
        if not self.post_process:
            given = {"labels": labels, "loss_mask": loss_mask, "mtp_in_postprocess": False}
            return super()._postprocess(hidden_states, runtime_gather_output=runtime_gather_output, **given, **kwargs)
        if labels is None and mtp_in_postprocess:
            logits, _ = self.output_layer(hidden_states, weight=self._shared_weight(), runtime_gather_output=runtime_gather_output)
            return self._limit(logits.transpose(0, 1).contiguous())
        if labels is None:
            given = {"labels": None, "loss_mask": loss_mask, "mtp_in_postprocess": mtp_in_postprocess}
            return self._limit(super()._postprocess(hidden_states, runtime_gather_output=runtime_gather_output, **given, **kwargs))
        log_probs = self._log_probs(hidden_states, labels)
        if not mtp_in_postprocess or not self.training or loss_mask is None:
            return log_probs
        return MTPLossAutoScaler.apply(log_probs, self._further_loss(hidden_states, labels, loss_mask, **kwargs))

    def _shared_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _further_loss(
        self, hidden_states: Tensor, labels: Tensor, weights: Tensor, *, inference_params: Any = None, extra_block_kwargs: Any = None, **kwargs: Any
    ) -> Tensor:
        """The loss of the layers that predict further ahead, a sum to be divided as the main one is (DeepSeek-V3, arXiv 2412.19437, eq. 24-25).

        Layer k reads the hidden states of layer k - 1 and the tokens k places on, and is asked for the token that follows those.
        """
        names = ("input_ids", "position_ids", "attention_mask", "rotary_pos_emb", "packed_seq_params")
        states = self.mtp(hidden_states=hidden_states, embedding=self.embedding, **{name: kwargs.get(name) for name in names})
        roll = functools.partial(roll_tensor, cp_group=self.pg_collection.cp, packed_seq_params=kwargs.get("packed_seq_params"))
        total = torch.zeros((), device=labels.device)
        for state in states.chunk(1 + self.description.built_further)[1:]:
            (labels, _), (weights, _) = roll(labels), roll(weights)
            labels = labels.masked_fill(weights == 0, IGNORE)
            total = total - (self._log_probs(state, labels) * weights).sum()
        return total * (self.config.mtp_loss_scaling_factor / self.description.built_further)

    def _log_probs(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """fp32 ``[b, s]`` of `hidden_states` ``[s here, b, hidden]`` behind the last norm."""
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
