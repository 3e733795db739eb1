"""The plan of an export: which HF tensors a spread-out model makes, of what shape and type, in which file, by which rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mswift.conversion.collective import ExportGroups, exchange
from mswift.conversion.coverage import fail_on, gap, gaps, rules_by_target, source_rows
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
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    shard: Shard
    value: Callable[[], torch.Tensor]

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
    """``rules``: of the parameters that each stage writes, by stage and name. ``files``: of the whole model."""

    rules: list[dict[str, Rule]]
    files: list[OutFile]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def num_tensors(self) -> int:
        return sum(len(file.specs) for file in self.files)

    def writers_of(self, stage: int, replica: int) -> dict[str, int]:
        """The tensor-parallel rank that writes each HF tensor, for those that one replica of one stage writes."""
        return {name: file.tp_rank for file in self.files if (file.stage, file.replica) == (stage, replica) for name in file.specs}


def plan_export(
    stages: Sequence[Mapping[str, TensorSpec]],
    rules: Sequence[AnyRule],
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int = 5 * 10**9,
    num_replicas: int = 1,
    tp_size: int = 1,
) -> ExportPlan:
    """From what every pipeline stage holds, as whole parameters, to files. A parameter that several stages hold is the first one's.

    Raises:
        ConversionError: model and rules do not match one to one, or an HF tensor would lack rows.
    """
    by_target = rules_by_target(rules)
    owners = {name: stage for stage in reversed(range(len(stages))) for name in stages[stage]}
    specs = {name: stages[owners[name]][name] for held in stages for name in held}
    fail_on(gaps(rules, specs, {source for rule in by_target.values() for source in rule.sources}), "export this model")
    exported = {name: by_target[name] for name in specs if by_target[name].exported}
    shapes, problems = source_rows(exported, {name: spec.shape for name, spec in specs.items()})
    tensors: list[dict[str, TensorSpec]] = [{} for _ in stages]
    for name, rule in exported.items():
        for source in rule.sources:
            tensors[owners[name]].setdefault(source, TensorSpec(cast_of(specs[name].dtype, dtype), shapes[source]))
    spread = [name for name in shapes if sum(name in stage for stage in tensors) > 1]
    fail_on([*problems, *gap("tensor", spread, "spread over pipeline stages")], "export this model")
    files = plan_files(tensors, max_bytes, num_replicas, tp_size)
    return ExportPlan([{name: rule for name, rule in exported.items() if owners[name] == stage} for stage in range(len(stages))], files)


def cast_of(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that is written: ``wanted`` for floating-point tensors, if there is one."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


@dataclass(frozen=True, slots=True)
class _Held:
    """What one rank tells the others: in full from the first rank of a stage, as a digest from the rest."""

    stage: int
    digest: str
    specs: dict[str, TensorSpec]


def held_by_stages(parameters: Sequence[ExportParameter], groups: ExportGroups) -> list[dict[str, TensorSpec]]:
    """The whole parameters of every pipeline stage, in order. Collective.

    Raises:
        ConversionError: ranks of one stage disagree; on all ranks.
    """
    specs = {parameter.name: parameter.whole for parameter in parameters}
    digest = hashlib.sha256(repr([(parameter.name, parameter.whole) for parameter in parameters]).encode()).hexdigest()
    first = groups.tp_rank == 0 and groups.replica == 0
    entries = exchange(_Held(groups.stage, digest, specs if first else {}), groups)
    stages: list[dict[str, TensorSpec]] = [{} for _ in range(groups.num_stages)]
    for entry in entries:
        stages[entry.stage].update(entry.specs)
    if any(len({entry.digest for entry in entries if entry.stage == stage}) > 1 for stage in range(groups.num_stages)):
        raise ConversionError("the ranks of one pipeline stage hold different parameters, or in a different order; export needs the same on each")
    return stages
