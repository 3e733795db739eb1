"""The plan of an export: which HF tensors a spread-out model makes, of what shape and type, in which file, by which rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mswift.conversion.collective import ExportGroups, exchange
from mswift.conversion.coverage import fail_on, gaps, rules_by_target, source_rows
from mswift.conversion.file_plan import OutFile, plan_files
from mswift.conversion.load import LocalParameter
from mswift.conversion.rules import AnyRule, Rule, Shape
from mswift.conversion.safetensors_io import TensorSpec
from mswift.conversion.shards import Shard
from mswift.errors import ConversionError


@dataclass(frozen=True, slots=True)
class ExportParameter:
    """This rank's part of one megatron parameter, made when its turn comes.

    Args:
        name: in the whole model. shape, dtype: of the local part. shard: which part it is.
        value: gives the local tensor; runs on all tensor-parallel ranks in one order, so it may communicate among them. A merged LoRA
            weight is computed here, and freed once written; where it is wider than what is written, it is rounded once.
        release: called when its value is not needed any more; it may be asked for again. expect: called when its turn is the next but one.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    shard: Shard
    value: Callable[[], torch.Tensor]
    release: Callable[[], None] = lambda: None
    expect: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, parameter: LocalParameter) -> ExportParameter:
        """A parameter that is exported as it stands."""
        tensor = parameter.tensor
        return cls(parameter.name, tuple(tensor.shape), tensor.dtype, parameter.shard, tensor.detach)

    @property
    def whole(self) -> TensorSpec:
        """Type and shape of the whole parameter."""
        return TensorSpec(self.dtype, self.shard.whole_shape(self.shape))


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """``rules``: of the parameters that each place writes, by place and name. ``files``: of the whole model."""

    rules: list[dict[str, Rule]]
    files: list[OutFile]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def num_tensors(self) -> int:
        return sum(len(file.specs) for file in self.files)

    def digest(self) -> str:
        """The same for two plans that write the same files."""
        return hashlib.sha256(repr([(file.name, file.specs) for file in self.files]).encode()).hexdigest()

    def writers_of(self, place: int, replica: int) -> dict[str, int]:
        """The shard rank that writes each HF tensor, for those that one replica of one place writes."""
        own = {name: file.shard for file in self.files if (file.place, file.replica) == (place, replica) for name in file.specs}
        helped = {name: 0 for file in self.files if replica == 0 and place in file.helpers for name in file.specs}
        return {**helped, **own}


def plan_export(
    places: Sequence[Mapping[str, TensorSpec]],
    rules: Sequence[AnyRule],
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int = 5 * 10**9,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> ExportPlan:
    """From what every place holds, as whole parameters, to files. A parameter that several places hold is the first one's.

    Args:
        sizes: (replicas, shards) of each place; None: one of each.

    Raises:
        ConversionError: model and rules do not match one to one, or an HF tensor would lack rows.
    """
    by_target = rules_by_target(rules)
    owners = {name: place for place in reversed(range(len(places))) for name in places[place]}
    specs = {name: places[owners[name]][name] for held in places for name in held}
    fail_on(gaps(rules, specs, {source for rule in by_target.values() for source in rule.sources}), "export this model")
    exported = {name: by_target[name] for name in specs if by_target[name].exported}
    shapes, problems = source_rows(exported, {name: spec.shape for name, spec in specs.items()})
    fail_on(problems, "export this model")
    tensors: list[dict[str, TensorSpec]] = [{} for _ in places]
    for name, rule in exported.items():
        for source in rule.sources:
            tensors[owners[name]].setdefault(source, TensorSpec(cast_of(specs[name].dtype, dtype), shapes[source]))
    files = plan_files(tensors, max_bytes, sizes)
    return ExportPlan([{name: rule for name, rule in exported.items() if owners[name] == place} for place in range(len(places))], files)


def cast_of(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that is written: ``wanted`` for floating-point tensors, if there is one."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


@dataclass(frozen=True, slots=True)
class _Held:
    """What one rank tells the others of one place: in full from the first rank there, as a digest from the rest."""

    place: int
    digest: str
    specs: dict[str, TensorSpec]


def held_by_places(parameters: Sequence[ExportParameter], groups: ExportGroups) -> list[dict[str, TensorSpec]]:
    """The whole parameters of every place, in order. Collective.

    Raises:
        ConversionError: ranks of one place disagree; on all ranks.
    """
    mine = []
    for axis, spread in groups.spreads.items():
        own = [(parameter.name, parameter.whole) for parameter in parameters if parameter.shard.axis == axis]
        first = spread.shard == 0 and spread.replica == 0
        mine.append(_Held(groups.place(axis), hashlib.sha256(repr(own).encode()).hexdigest(), dict(own) if first else {}))
    entries = [entry for held in exchange(mine, groups) for entry in held]
    places: list[dict[str, TensorSpec]] = [{} for _ in groups.sizes]
    for entry in entries:
        places[entry.place].update(entry.specs)
    if any(len({entry.digest for entry in entries if entry.place == place}) > 1 for place in range(len(places))):
        raise ConversionError("the ranks of one pipeline stage hold different parameters, or in a different order; export needs the same on each")
    return places
