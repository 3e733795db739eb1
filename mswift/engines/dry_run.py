"""What a conversion would do, without doing it: every rank's model is built with no memory behind it, in a world that is only imagined."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mswift.conversion.coverage import gaps, rules_by_target
from mswift.conversion.directories import CONFIG_FILE, read_json
from mswift.conversion.file_forms import stacked_in, with_stacks
from mswift.conversion.load import LocalParameter, Progress, plan_load
from mswift.conversion.quantised import open_checkpoint
from mswift.conversion.rules import AnyRule
from mswift.families import find_family, text_config
from mswift.families.base import choose_dtype
from mswift.families.common import all_rules
from mswift.families.fields import describe_checked
from mswift.families.model import base_parameters, build_model, read_hf_config, transformer_config
from mswift.parallel.groups import make_groups
from mswift.parallel.layout import ParallelLayout
from mswift.runtime.device import Runtime


@dataclass(frozen=True, slots=True)
class Mapping:
    """One megatron parameter: its name, this rank's shape, ``/tp2`` or the like where it is split, bytes, and the HF tensors that make it."""

    name: str
    shape: tuple[int, ...]
    split: str
    nbytes: int
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What the first of a group of equal ranks holds: pipeline stage, share of the experts, its parameters."""

    stage: int
    ep: int
    parameters: list[Mapping]

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class DryRun:
    """The plans of all groups of equal ranks, the bytes of the source, and what does not fit (empty: all is accounted for)."""

    ranks: list[RankPlan]
    source_bytes: int
    num_tensors: int
    problems: list[str]


def plan_conversion(
    directory: Path, layout: ParallelLayout, runtime: Runtime, *, dtype: str | None, trust_remote_code: bool, progress: Progress | None = None
) -> DryRun:
    """Build every kind of rank of a layout on the meta device; reads config.json and the headers of the weights only.

    Tensor-parallel ranks and copies hold equal shapes, so that one of each is built. No processes may be joined.

    Raises:
        ModelError, LayoutError: the model is not supported, or the layout does not divide it.
    """
    hf = read_hf_config(directory, trust_remote_code=trust_remote_code)
    family, path = find_family(hf.architectures, str(directory)), directory / CONFIG_FILE
    description = describe_checked(family, text_config(read_json(path), str(path)), hf, str(path), allow_unknown=True)
    wanted = getattr(torch, choose_dtype(dtype, hf.dtype, str(directory)))
    ranks, names, shapes = [], set(), []
    places = [(stage, ep) for stage in range(layout.pp) for ep in range(layout.ep)]
    with open_checkpoint(directory) as reader:
        further = family.count_further(hf, reader.names)
        description = description.with_further(further)
        rules = all_rules(family, hf, description.padding(layout.tp), further)
        rules = with_stacks(rules, stacked_in(rules, reader.names))
        for done, (stage, ep) in enumerate(places, start=1):
            with _Imagined(layout, _rank_of(layout, stage, ep)) as groups, torch.device("meta"):
                config = transformer_config(description, groups, runtime, dtype=wanted, sequence_parallel=layout.tp > 1)
                local = [LocalParameter(*entry) for chunk in build_model(description, config, groups) for entry in base_parameters(chunk, groups)]
            names |= {parameter.name for parameter in local}
            ranks.append(RankPlan(stage, ep, [_mapping(parameter, rules) for parameter in local]))
            shapes.append(local)
            if progress is not None:
                progress(done, len(places))
        problems = gaps(rules, names, reader.names)
        if not problems:
            for local in shapes:
                plan_load(local, rules, reader, model_parameters=names)  # raises on a wrong shape or type
        return DryRun(ranks, sum(math.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in reader.names), len(reader.names), problems)


def _mapping(parameter: LocalParameter, rules: Iterable[AnyRule]) -> Mapping:
    rule = rules_by_target(rules).get(parameter.name)
    shard, tensor = parameter.shard, parameter.tensor
    split = f"/{shard.axis}{shard.size}" if shard.dim is not None and shard.size > 1 else ""
    return Mapping(parameter.name, tuple(tensor.shape), split, tensor.numel() * tensor.element_size(), rule.sources if rule else ())


def _rank_of(layout: ParallelLayout, stage: int, ep: int) -> int:
    """The first rank of a stage that holds a share of the experts."""
    ranks = range(stage * (layout.world // layout.pp), (stage + 1) * (layout.world // layout.pp))
    return next(rank for rank in ranks if layout.expert_coords(rank).ep == ep)


class _Imagined:
    """One rank of a world in which every collective returns at once; torch's own means to try out what ranks do."""

    def __init__(self, layout: ParallelLayout, rank: int) -> None:
        self.layout, self.rank = layout, rank

    def __enter__(self):  # type: ignore[no-untyped-def]
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=self.rank, world_size=self.layout.world, store=FakeStore())
        return make_groups(self.layout, gloo=False)

    def __exit__(self, *_: object) -> None:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def summary(plan: RankPlan) -> list[tuple[int, Mapping]]:
    """(how often, one of them) for parameters that differ in nothing but the numbers of layer and expert."""
    found: dict[tuple[object, ...], tuple[int, Mapping]] = {}
    for entry in plan.parameters:
        name, sources = _numbered(entry.name), tuple(_numbered(source) for source in entry.sources)
        key = (name, entry.shape, entry.split, sources)
        count = found[key][0] if key in found else 0
        found[key] = (count + 1, dataclasses.replace(entry, name=name, sources=sources))
    return list(found.values())


def _numbered(name: str) -> str:
    return re.sub(r"(experts)\.\d+\.", r"\1.E.", re.sub(r"(local_experts)\.\d+\.", r"\1.E.", re.sub(r"layers\.\d+\.", "layers.N.", name)))
