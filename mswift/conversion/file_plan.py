"""Which HF tensor goes into which file and which rank writes that file: pure arithmetic, so that all ranks reach the same plan alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mswift.conversion.directories import SINGLE_FILE
from mswift.conversion.safetensors_io import TensorSpec

_WORTH = 256 * 10**6  # bytes of a file that is made for another process to write


@dataclass(frozen=True, slots=True)
class OutFile:
    """One safetensors file and the rank that makes it: ``place`` (`collective.Spread`), ``replica`` of it, ``shard`` inside that.

    ``helpers``: other places that hold rows of its tensors; the first rank of each writes them into the file.
    """

    name: str
    place: int
    replica: int
    shard: int
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    helpers: tuple[int, ...] = ()

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


def plan_files(places: Sequence[Mapping[str, TensorSpec]], max_bytes: int, sizes: Sequence[tuple[int, int]] | None = None) -> list[OutFile]:
    """The files of a model; a file belongs to one place, and a place's files go round its replicas, then its shards.

    What is worth it is split in as many files as there are replicas, for a replica writes whole files.

    Args:
        places: for each place the HF tensors that it makes, in order; a tensor of several places goes into a file of the first.
        sizes: (replicas, shards) of each place; None: one of each.
    """
    makers: dict[str, list[int]] = {}
    for place, tensors in enumerate(places):
        for name in tensors:
            makers.setdefault(name, []).append(place)
    own = [{name: spec for name, spec in tensors.items() if makers[name][0] == place} for place, tensors in enumerate(places)]
    limits = [_limit(tensors, max_bytes, sizes[place][0] if sizes else 1) for place, tensors in enumerate(own)]
    groups = [(place, specs) for place, tensors in enumerate(own) for specs in split_by_size(tensors, limits[place])]
    files: list[OutFile] = []
    for number, (place, specs) in enumerate(groups, start=1):
        num_replicas, num_shards = sizes[place] if sizes else (1, 1)
        shard, replica = divmod(sum(file.place == place for file in files), num_replicas)
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        helpers = sorted({other for tensor in specs for other in makers[tensor][1:]})
        files.append(OutFile(name, place, replica, shard % num_shards, specs, tuple(helpers)))
    return files


def _limit(specs: Mapping[str, TensorSpec], max_bytes: int, num_replicas: int) -> int:
    """The size of a file, such that every replica has one if it is worth it."""
    whole = sum(spec.nbytes for spec in specs.values())
    if num_replicas == 1 or whole < num_replicas * _WORTH:
        return max_bytes
    return min(max_bytes, -(-whole // num_replicas) + max(spec.nbytes for spec in specs.values()))


def index_of(files: Sequence[OutFile]) -> dict[str, object]:
    """The content of ``model.safetensors.index.json``; total_size in bytes."""
    weight_map = {name: file.name for file in files for name in file.specs}
    return {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": dict(sorted(weight_map.items()))}
