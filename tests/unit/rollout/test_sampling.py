"""Our functions of logits against transformers' own processors, and what is drawn from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mswift.rollout.sampling import Sampling, draw, keep_top_k, keep_top_p, next_tokens, warp

VOCAB = 37


def logits_of(seed: int, rows: int = 3, *, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


def theirs(sampling: Sampling) -> LogitsProcessorList:
    """The processors that `generate` makes for these settings, in its order."""
    chain: list[LogitsProcessor] = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if not sampling.is_greedy:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        chain += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        chain.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(chain)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 36, 37, 1000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
)


@given(sampling=SAMPLINGS, seed=st.integers(0, 1000), ties=st.booleans())
@settings(max_examples=150, deadline=None)
def test_warped_logits_equal_those_of_transformers(sampling: Sampling, seed: int, ties: bool) -> None:
    logits = logits_of(seed, ties=ties)
    tokens = torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(seed + 1))
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter(1, tokens, True)
    untouched = logits.clone()
    warped = warp(logits, sampling, seen)
    assert torch.equal(warped, theirs(sampling)(tokens, logits.clone()))
    assert torch.equal(logits, untouched)
    assert warped.isfinite().any(-1).all()


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_top_k(logits, 2).isfinite().tolist() == [[True, True, False, False]]
    assert keep_top_p(logits, 0.75).isfinite().tolist() == [[True, True, False, False]]
    assert keep_top_p(logits, 0.81).isfinite().tolist() == [[True, True, True, False]]
    assert keep_top_p(logits, 1e-9).isfinite().tolist() == [[True, False, False, False]]


def test_draws_follow_the_probabilities_and_never_take_what_was_dropped() -> None:
    logits = torch.tensor([[-torch.inf, 0.6, 0.3, -torch.inf, 0.1, -torch.inf]])
    logits[0, [1, 2, 4]] = logits[0, [1, 2, 4]].log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.cat([draw(logits, [generator]) for _ in range(4000)]), minlength=6)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert counts[[1, 2, 4]].div(4000).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits = logits_of(1, rows=4)
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    together = torch.stack([draw(logits, generators) for _ in range(3)], dim=1).tolist()
    alone = []
    for row in range(4):
        generator = torch.Generator().manual_seed(row)
        alone.append([draw(logits[row : row + 1], [generator]).item() for _ in range(3)])
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_temperature_0_takes_the_likeliest_and_needs_no_generator() -> None:
    logits = logits_of(2)
    assert torch.equal(next_tokens(logits, Sampling()), logits.argmax(-1))
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter(1, logits.argmax(-1, keepdim=True), True)
    penalised = next_tokens(logits, Sampling(repetition_penalty=1e6), seen=seen)
    assert not (penalised == logits.argmax(-1)).any()
    generators = [torch.Generator().manual_seed(3) for _ in range(3)]
    assert torch.equal(next_tokens(logits, Sampling(temperature=1e-4), generators), logits.argmax(-1))
