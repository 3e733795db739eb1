"""Tokens to their experts and back by the kernels: what megatron-core's own dispatcher gives, on the execution model of csrc/emu."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mswift.families.modules.dispatch import RowDispatcher
from mswift.kernels import choice, extension
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.tiny import make_checkpoint
from tests.unit.kernels.emulated import Emulated, on_cpu

pytestmark = pytest.mark.skipif(not extension.isa_at_least("avx2"), reason="the operators are not built, or their faces would not take them here")


def by_either(rank: int, world: int, run: Run) -> tuple[list[list[Tensor]], list[bool]]:
    """Output and gradients of the first mixture with megatron's way of moving rows and with ours, and whether ours was taken."""
    layer = next(module for module in open_model(run, world).chunks[0].modules() if isinstance(module, MoELayer))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    hidden = torch.randn(5 + 2 * rank, 2, layer.config.hidden_size, generator=generator)
    assert isinstance(layer.token_dispatcher, RowDispatcher)
    found, ours, plain = [], [], choice._operators["permute"]
    with on_cpu(Emulated()):
        for fits in (plain.fits, lambda *_: None):
            choice._operators["permute"] = dataclasses.replace(plain, fits=fits)
            x = hidden.clone().requires_grad_()
            output = layer(x)[0]
            wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
            gradients = torch.autograd.grad(output.sin().sum(), wanted, allow_unused=True)
            found.append([output.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True))])
            ours.append(layer.token_dispatcher.places is not None)
    return found, ours


@pytest.mark.parametrize("ep", [1, 2])
def test_rows_go_where_megatron_sends_them(ep: int, tmp_path: Path) -> None:
    family, changes = options_of("mixtral/plain")
    run = Run(make_checkpoint(tmp_path / "model", family, **changes), ep=ep)
    for (theirs, ours), taken in run_distributed(by_either, ep, run):
        assert taken == [False, True]
        assert len(ours) > 8
        assert ours[0].abs().max() > 0.1
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape
            assert (mine - other).norm() <= 1e-5 * other.norm()
