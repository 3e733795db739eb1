"""A dry run says of every rank what that rank really holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.tiny import as_pickle, make_checkpoint


def really(rank: int, world: int, run: Run) -> tuple[int, int, list[tuple[str, tuple[int, ...]]]]:
    """(stage, share of the experts, every parameter with its shape on this rank)"""
    model = open_model(run, world, deferred=True)
    ep = model.groups.layout.expert_coords(rank).ep
    return model.groups.coords.pp, ep, [(name, tuple(tensor.shape)) for name, tensor in model.named_tensors()]


def imagined(rank: int, world: int, directory: Path, sizes: dict[str, int]) -> list[tuple[int, int, list[tuple[str, tuple[int, ...]]]]]:
    """The same of the first rank of each kind; the process leaves the world that the harness made, for it imagines one of its own."""
    import torch.distributed as dist

    from mswift.engines.dry_run import plan_conversion
    from mswift.parallel.layout import ParallelLayout
    from mswift.runtime.device import select

    dist.destroy_process_group()
    plan = plan_conversion(directory, ParallelLayout.smallest(**sizes), select("cpu"), dtype=None, trust_remote_code=False)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    assert plan.problems == []
    return [(part.stage, part.ep, [(entry.name, entry.shape) for entry in part.parameters]) for part in plan.ranks]


@pytest.mark.parametrize(
    ("case", "sizes"),
    [("llama/plain", {"tp": 2, "pp": 2}), ("qwen3_moe/plain", {"ep": 2, "pp": 2}), ("gemma2/plain", {"pp": 2, "vpp": 2})],
    ids=["tp2-pp2", "ep2-pp2", "pp2-vpp2"],
)
def test_what_is_imagined_is_what_is_held(case: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    family, changes = options_of(case)
    source = make_checkpoint(tmp_path / "model", family, **changes)
    if case == "gemma2/plain":  # one from a pickle
        as_pickle(source)
    world = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("ep", 1)
    held = run_distributed(really, world, Run(source, **sizes), timeout=120)
    told = run_distributed(imagined, 1, source, sizes, timeout=120)[0]
    assert len(told) == sizes.get("pp", 1) * sizes.get("ep", 1)
    for stage, ep, parameters in told:
        same = [found for at, share, found in held if (at, share) == (stage, ep)]
        assert same
        assert all(found == parameters for found in same)
