"""From logits to the next token: pure functions of fp32 logits ``[b, vocab]``, in the order in which transformers applies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 always takes the likeliest token. top_k: draw from this many tokens, 0 = all. top_p: draw from the likeliest tokens
            with this total probability, 1 = all. repetition_penalty: 1 = none; above 1 makes tokens of prompt and answer less likely.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the tokens in `seen` (bool ``[b, vocab]``) by `penalty` (CTRL, Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the `k` highest logits of a row; those equal to the k-th stay as well."""
    lowest = torch.topk(logits, min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities add up to `p`; the likeliest always stays."""
    ascending, order = torch.sort(logits)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -1] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def warp(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Penalty, temperature, top-k and top-p in this order; temperature 0 leaves the logits as the penalty made them.

    Args:
        logits: fp32 ``[b, vocab]``. seen: bool ``[b, vocab]``, tokens of prompt and answer; needed if there is a penalty.
    """
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.is_greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    return keep_top_p(logits, sampling.top_p) if sampling.top_p < 1 else logits


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row with the softmax of its logits as probabilities: int64 ``[b]``.

    A row takes one number from its own CPU generator and looks it up in the cumulated probabilities, so that a request draws the same tokens
    alone and in a batch, and on every device.
    """
    numbers = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(logits.device, torch.float64)
    cumulated = logits.double().softmax(-1).cumsum(-1)
    # `right`: a token of probability 0 has the sum of the one before it and is never the first above the number
    return torch.searchsorted(cumulated, (numbers * cumulated[:, -1])[:, None], right=True)[:, 0]


def next_tokens(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator] = (), seen: Tensor | None = None) -> Tensor:
    """The next token of each row, int64 ``[b]``: the likeliest at temperature 0, else drawn with the row's generator."""
    warped = warp(logits, sampling, seen)
    return warped.argmax(-1) if sampling.is_greedy else draw(warped, generators)
