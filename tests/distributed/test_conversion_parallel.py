"""Conversion over real processes: loaded and exported in every small layout bit for bit; a failure on one rank leaves nothing behind."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from mswift.conversion.adapters import lora_from_peft, lora_to_peft
from mswift.conversion.collective import ExportGroups, Spread, gather_small
from mswift.conversion.export import ExportReport, export_model
from mswift.conversion.export_plan import ExportParameter
from mswift.conversion.load import LocalParameter, all_names, load_weights
from mswift.conversion.rules import FusedGateUp, FusedQKV, Rename
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.conversion.shards import Shard, take
from mswift.errors import ConversionError
from tests.distributed.harness import run_distributed
from tests.unit.conversion.synthetic import Model, equal_bits, local_parameters, write_checkpoint

FILE_BYTES = 1500


class Layout(NamedTuple):
    """Sizes; ranks in megatron's order: tensor parallel fastest, then replicas, then stages."""

    tp: int
    replicas: int
    stages: int


def groups_of(rank: int, layout: Layout) -> ExportGroups:
    tp_group = None
    for first in range(0, layout.tp * layout.replicas * layout.stages, layout.tp):
        group = dist.new_group(list(range(first, first + layout.tp)))
        tp_group = group if first <= rank < first + layout.tp else tp_group
    rest, tp_rank = divmod(rank, layout.tp)
    stage, replica = divmod(rest, layout.replicas)
    return ExportGroups({"tp": Spread(tp_group, tp_rank, layout.tp, stage, layout.stages, replica, layout.replicas)})


def loaded(model: Model, directory: Path, groups: ExportGroups) -> list[LocalParameter]:
    """This rank's parameters, zero until they are read from the checkpoint."""
    here = groups.spreads["tp"]
    local = model.megatron(model.tensors(), here.shard, here.num_shards, here.place, here.num_places)
    parameters = local_parameters(local, here.shard, here.num_shards, torch.zeros_like)
    with CheckpointReader(directory) as reader:
        load_weights(parameters, model.rules(), reader, model_parameters=all_names(parameters))
    return parameters


def _round_trip(rank: int, world_size: int, source: Path, layouts: list[Layout], models: list[Model]) -> list[ExportReport]:
    reports = []
    for layout in layouts:
        groups = groups_of(rank, layout)
        for index, model in enumerate(models):
            parameters = loaded(model, source / str(index), groups)
            target = source / f"out-{index}-{layout.tp}-{layout.replicas}-{layout.stages}"
            local = map(ExportParameter.of, parameters)
            reports.append(export_model(local, model.rules(), target, config={}, groups=groups, max_shard_size=FILE_BYTES))
    return reports


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [(2, [Layout(2, 1, 1), Layout(1, 1, 2), Layout(1, 2, 1)]), (4, [Layout(4, 1, 1), Layout(2, 1, 2), Layout(2, 2, 1), Layout(1, 2, 2)])],
)
def test_round_trip_in_every_layout(tmp_path: Path, world_size: int, layouts: list[Layout]) -> None:
    models = [Model(), Model(tied=True, dtype=torch.float32)]
    for index, model in enumerate(models):
        write_checkpoint(tmp_path / str(index), model.tensors())
    by_rank = run_distributed(_round_trip, world_size, tmp_path, layouts, models)
    assert len(by_rank[0]) == len(layouts) * len(models)
    for reports in zip(*by_rank):
        total = reports[0].bytes
        assert all(0 < report.own_bytes < total for report in reports)  # every rank wrote, none all
        assert sum(report.own_bytes for report in reports) == total
        model = models[int(reports[0].directory.name.split("-")[1])]
        with CheckpointReader(reports[0].directory) as reader:
            assert equal_bits({name: reader.read(name) for name in reader.names}, model.tensors())
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def _failures(rank: int, world_size: int, folder: Path) -> list[tuple[str, list[str]]]:
    """Every case on all ranks: the message that each got, and what lies in the folder afterwards."""
    model, groups = Model(), groups_of(rank, Layout(2, 1, 1))
    good = [ExportParameter.of(parameter) for parameter in loaded(model, folder / "in", groups)]
    seen = []

    def attempt(parameters: list[ExportParameter], target: str = "out", size: int = FILE_BYTES) -> None:
        with pytest.raises(Exception) as caught:
            export_model(parameters, model.rules(), folder / target, config={}, groups=groups, max_shard_size=size, exist_ok=True)
        dist.barrier()
        seen.append((f"{caught.type.__name__}: {caught.value}", sorted(path.name for path in folder.iterdir())))
        dist.barrier()

    def explode() -> torch.Tensor:
        raise RuntimeError("no merge today")

    for at in (0, 5, len(good) - 1):
        attempt([replace(parameter, value=explode) if rank == 1 and index == at else parameter for index, parameter in enumerate(good)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if rank == 1 else limits[0], limits[1]))
    attempt(good)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    attempt(good, target="full")
    attempt(good[::-1] if rank == 1 else good)
    attempt(good[1:])
    return seen


def test_a_failure_on_one_rank_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    model = Model()
    write_checkpoint(tmp_path / "in", model.tensors())
    write_checkpoint(tmp_path / "out", model.tensors(seed=1))  # an earlier export, which may be replaced
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    first, second = run_distributed(_failures, 2, tmp_path)
    for (text, left), (_, left_there) in zip(first, second):
        assert left == left_there == ["full", "in", "out"]
        assert "\n" not in text
    texts = [text for text, _ in first]
    assert texts[:3] == ["ConversionError: rank 1 failed: RuntimeError: no merge today"] * 3
    assert [text for text, _ in second][:3] == ["RuntimeError: no merge today"] * 3
    assert texts[3].startswith("ConversionError: rank 1 failed: cannot write ")
    assert "something other than a model" in texts[4]
    assert second[4][0].startswith("ConversionError: rank 0 failed: output directory")
    assert "in a different order" in texts[5]
    assert "without a parameter" in texts[6]
    assert texts[5:] == [text for text, _ in second][5:]
    with CheckpointReader(tmp_path / "out") as reader:
        assert equal_bits({name: reader.read(name) for name in reader.names}, model.tensors(seed=1))


def _adapters(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Every stage has LoRA on three kinds of layer; each rank keeps its shard, rank 0 gets all of them whole."""
    groups = groups_of(rank, Layout(2, 1, 2))
    here = groups.spreads["tp"]
    local: dict[str, tuple[torch.Tensor, Shard, int]] = {}
    for name, (a, b, a_dim, b_dim, parts) in _whole_adapters(here.place).items():
        of_a, of_b = Shard(a_dim, here.shard, 2), Shard(b_dim, here.shard, 2)
        local[f"{name}.a"] = (take(a, of_a), of_a, 1)
        local[f"{name}.b"] = (take(b, of_b, parts), of_b, parts)
    return gather_small(local, groups)


def _whole_adapters(stage: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, int | None, int | None, int]]:
    generator = torch.Generator().manual_seed(stage)

    def pair(out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(3, into, generator=generator), torch.randn(out, 3, generator=generator)

    return {
        f"{stage}.qkv": (*pair(48, 12), None, 0, 1),
        f"{stage}.fc1": (*pair(40, 12), None, 0, 2),
        f"{stage}.fc2": (*pair(12, 20), 1, None, 1),
    }


def test_adapters_come_together_on_rank_0() -> None:
    first, *others = run_distributed(_adapters, 4)
    assert others == [{}, {}, {}]
    for stage in range(2):
        rules = {
            "qkv": FusedQKV("t", "l.q.weight", "l.k.weight", "l.v.weight", 3, 2, 4),
            "fc1": FusedGateUp("t", "l.gate.weight", "l.up.weight"),
            "fc2": Rename("t", "l.down.weight"),
        }
        for name, (a, b, *_) in _whole_adapters(stage).items():
            got_a, got_b = first[f"{name}.a"], first[f"{name}.b"]
            assert torch.equal(got_a, a)
            assert torch.equal(got_b, b)
            rule = rules[name.split(".")[1]]
            back = lora_from_peft(rule, lora_to_peft(rule, got_a, got_b), (b.shape[0], a.shape[1]))
            assert back is not None
            assert torch.equal(back[1], b)


def test_sizes_must_make_the_world() -> None:
    with pytest.raises(ConversionError, match="4 ranks, but 1 process"):
        ExportGroups({"tp": Spread(num_shards=2, num_places=2)})
