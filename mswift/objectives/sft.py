"""Supervised fine-tuning: the mean negative log-likelihood of the tokens that carry weight."""

from __future__ import annotations

from mswift.objectives.base import LossOut, Outputs, ScoredBatch


class SupervisedObjective:
    """``sum(weight * -log p) / sum(weight)``, over the assistant tokens of the global batch."""

    name = "sft"

    def loss(self, outputs: Outputs, batch: ScoredBatch) -> LossOut:
        return LossOut(total=-(outputs.log_probs * batch.weights).sum(), weight=batch.weights.sum())
