"""The learning rate of every step as a pure function: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Linear warm-up to `peak`, then a decay to `minimum` at `total_steps`.

    Args:
        peak, minimum: rates. warmup_steps: steps until the peak. total_steps: optimizer steps of the whole run. kind: shape of the decay.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    minimum: float = 0.0
    kind: Literal["cosine", "linear", "constant"] = "cosine"

    def at(self, step: int) -> float:
        """The rate of optimizer step `step` (the first is 0)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        share = 0.5 * (1.0 + math.cos(math.pi * done)) if self.kind == "cosine" else 1.0 - done
        return self.minimum + (self.peak - self.minimum) * share
