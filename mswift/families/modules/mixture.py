"""Parts of a mixture of experts that megatron-core lacks: routers with other choices or biases, and experts whose linears have biases."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn

from mswift.families.base import RouterStyle
from mswift.families.modules.layers import BiasedRowParallelLinear


class StyledRouter(TopKRouter):
    """megatron's router with a bias on its logits, or with another way to choose and weigh the experts.

    Args:
        style: what the family's router does.
    """

    def __init__(self, config: TransformerConfig, *, style: RouterStyle, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.style = style
        experts = config.num_moe_experts or 0
        if style.wide:
            self.weight.data = self.weight.data.float()
        if style.bias:
            self.bias = nn.Parameter(torch.empty(experts, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if style.kind == "corrected_softmax":
            del self.expert_bias  # a plain None in the stock router, which has this buffer for sigmoids alone
            self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32, device=torch.cuda.current_device()))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits fp32 ``[s, b, experts]`` -> (weights, bool map of the chosen), both ``[s * b, experts]``."""
        if self.style.kind == "topk":
            return super().routing(logits, padding_mask=padding_mask)
        logits = logits.view(-1, logits.shape[-1])
        choose = self._by_corrected_softmax if self.style.kind == "corrected_softmax" else self._by_sparsemixer
        weights, chosen = choose(logits)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        return torch.zeros_like(logits).scatter(1, chosen, weights), routing_map

    def _by_corrected_softmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts by softmax plus bias, weights by softmax alone, normalised by a sum of at least ``floor``."""
        scores = logits.softmax(-1)
        chosen = (scores + self.expert_bias).topk(self.topk, dim=-1).indices
        weights = scores.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True).clamp(min=self.style.floor), chosen

    def _by_sparsemixer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Two experts, each weighed by a softmax over those not far below it: the evaluation form of SparseMixer-2 (arXiv 2409.12136)."""
        first = logits.argmax(-1, keepdim=True)
        rest = logits.scatter(1, first, -torch.inf)
        second = rest.argmax(-1, keepdim=True)
        pairs = ((logits, first), (rest, second))
        weights = [self._near(logits, left, best).softmax(-1).gather(1, best) for left, best in pairs]
        return torch.cat(weights, 1), torch.cat((first, second), 1)

    def _near(self, logits: Tensor, left: Tensor, best: Tensor) -> Tensor:
        """`left` without the experts that lie relatively more than twice ``jitter`` below the best of it."""
        with torch.no_grad():
            top = left.gather(1, best)
            far = (top - logits) / torch.maximum(logits.abs(), top) > 2 * self.style.jitter
        return left.masked_fill(far, -torch.inf)


class BiasedExpertRowLinear(BiasedRowParallelLinear):
    """The second linear of an expert, with a bias that one of the ranks that share the expert adds: their outputs are summed later on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # its gradient lies on that one rank; summed over ranks where they share experts, never where each has experts of its own
        shared = self.tp_group.size() > 1
        self.bias.sequence_parallel = self.sequence_parallel and shared
        if not shared:  # else megatron counts it in the norm of gradients on the first of the ranks, each of which has other experts
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        return self.share_bias(super().forward(input_)[0])

    def share_bias(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and what this rank adds to it."""
        return output.clone(), self.bias if self.tp_group.rank() == 0 else self.bias * 0.0  # megatron adds the bias in place


class SharedExperts(SharedExpertMLP):
    """megatron's expert of all tokens, with a place for an adapter on the weight of its gate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate_adapter: nn.Module | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[s, b, hidden]`` -> ``[s, b, hidden]``."""
        if self.gate_adapter is None:
            return super().forward(hidden_states)
        output, _ = MLP.forward(self, hidden_states)
        logits = nn.functional.linear(hidden_states, self.gate_weight)
        return output * (logits + self.gate_adapter(hidden_states).to(logits.dtype)).sigmoid()
