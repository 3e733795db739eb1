"""All experts of a rank in two calls: what megatron-core gets from one expert after another, gradients, biases and adapters included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from mswift.families.modules import GroupedExperts
from mswift.kernels.elementwise import SILU, Gate
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.tiny import make_checkpoint

CASES = {
    "mixtral": (*options_of("mixtral/plain"), False),
    "mixtral-adapted": (*options_of("mixtral/plain"), True),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}, False),
    "gpt_oss-adapted": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}, True),
}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


def both_ways(rank: int, world: int, run: Run) -> tuple[list[list[Tensor]], Any]:
    """Output and gradients of the first mixture, together and one after another, for rows of which one expert gets none."""
    model = open_model(run, world)
    experts = next(module for module in model.chunks[0].modules() if isinstance(module, GroupedExperts))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
    counts = torch.tensor([5, 0, 9, 1, 2, 4][: experts.num_local_experts])
    rows = int(counts.sum())
    hidden = torch.randn(rows, experts.config.hidden_size, generator=generator)
    weights = torch.rand(rows, generator=generator)
    found = []
    for forward in (type(experts).forward, SequentialMLP.forward):
        x, of_rows = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        output, rest = forward(experts, x, counts, of_rows)
        assert rest is None
        wanted = [x, of_rows, *(parameter for parameter in experts.parameters() if parameter.requires_grad)]
        gradients = torch.autograd.grad(output.sin().sum(), wanted, allow_unused=True)
        found.append([output.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True))])
    return found, experts.gate


@pytest.mark.parametrize("case", CASES)
def test_together_as_one_after_another(case: str, tmp_path: Path) -> None:
    family, changes, adapted = CASES[case]
    run = Run(make_checkpoint(tmp_path / "model", family, **changes), lora=LORA if adapted else None)
    (together, apart), gate = run_distributed(both_ways, 1, run)[0]
    assert len(together) > 10
    for ours, theirs in zip(together, apart, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert apart[0].std() > 0.1
    assert gate == (Gate(slope=pytest.approx(1.702), limit=7.0, offset=1.0) if family == "gpt_oss" else SILU)
