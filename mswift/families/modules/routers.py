"""A router for the choices of experts that megatron-core's own does not make: groups judged otherwise, weights that are left as they are."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mswift.families.base import ExpertChoice


class GroupedRouter(TopKRouter):
    """megatron-core's router with another choice; scores, bias and factor are those of its configuration, and no balancing loss is added.

    Args:
        choice: which experts, and how they are weighed.
    """

    def __init__(self, *args: Any, choice: ExpertChoice, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choice = choice

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`logits` fp32 ``[..., experts]`` -> weights fp32 and choice bool, both ``[tokens, experts]``."""
        logits = logits.view(-1, logits.shape[-1])
        scores = logits.sigmoid() if self.score_function == "sigmoid" else logits.softmax(-1)
        worth = scores if self.expert_bias is None else scores + self.expert_bias
        chosen = self._within_best_groups(worth).topk(self.topk, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.choice.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * (self.config.moe_router_topk_scaling_factor or 1.0)
        return torch.zeros_like(scores).scatter(1, chosen, weights), torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)

    def _within_best_groups(self, worth: Tensor) -> Tensor:
        """The same with all experts of the other groups at minus infinity."""
        choice = self.choice
        if choice.groups == 1:
            return worth
        grouped = worth.unflatten(-1, (choice.groups, -1))
        best = grouped.topk(choice.judged_by, dim=-1).values.sum(-1).topk(choice.chosen_groups, dim=-1).indices
        open_groups = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
        return grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
