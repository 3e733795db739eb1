"""Which HF tensor goes into which file and which rank writes that file: pure arithmetic, so that all ranks reach the same plan alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mswift.conversion.directories import SINGLE_FILE
from mswift.conversion.safetensors_io import TensorSpec


@dataclass(frozen=True, slots=True)
class OutFile:
    """One safetensors file and the rank that writes it: pipeline ``stage``, ``replica`` of it, ``tp_rank`` inside that."""

    name: str
    stage: int
    replica: int
    tp_rank: int
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def split_by_size(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    """Consecutive tensors in groups of at most ``max_bytes``; a larger tensor has a group of its own."""
    groups: list[dict[str, TensorSpec]] = []
    size = 0
    for name, spec in specs.items():
        if not groups or size + spec.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    return groups


def plan_files(stages: Sequence[Mapping[str, TensorSpec]], max_bytes: int, num_replicas: int = 1, tp_size: int = 1) -> list[OutFile]:
    """The files of a model; a file holds tensors of one stage, and a stage's files go round its replicas, then its TP ranks.

    Args:
        stages: for each pipeline stage, the HF tensors that it makes, in order.
    """
    groups = [(stage, specs) for stage, tensors in enumerate(stages) for specs in split_by_size(tensors, max_bytes)]
    files: list[OutFile] = []
    for number, (stage, specs) in enumerate(groups, start=1):
        turn = sum(file.stage == stage for file in files)
        tp_rank, replica = divmod(turn, num_replicas)
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files.append(OutFile(name, stage, replica, tp_rank % tp_size, specs))
    return files


def index_of(files: Sequence[OutFile]) -> dict[str, object]:
    """The content of ``model.safetensors.index.json``; total_size in bytes."""
    weight_map = {name: file.name for file in files for name in file.specs}
    return {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": dict(sorted(weight_map.items()))}
