"""The few things that exporting ranks say to each other: who failed, a path, and the shards of one parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from mswift.conversion.rules import Parts
from mswift.conversion.shards import Axis, Shard, join
from mswift.errors import ConversionError, MswiftError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """How parameters of one kind lie over the ranks, and where this rank stands.

    Args:
        group: process group of the ranks that hold the shards of one parameter, in shard order; None for one rank.
        shard, num_shards: position in it.
        place, num_places: which parameters the rank holds: those of a pipeline stage (virtual stages included), or of a stage's share of the experts.
        replica, num_replicas: which copy of the place.
    """

    group: dist.ProcessGroup | None = None
    shard: int = 0
    num_shards: int = 1
    place: int = 0
    num_places: int = 1
    replica: int = 0
    num_replicas: int = 1


@dataclass(frozen=True, slots=True)
class ExportGroups:
    """Where this rank stands among those that hold one model.

    Args:
        spreads: by the axis that a parameter's `Shard` names; ``tp`` for the layers that all ranks share, ``etp`` for experts that are spread.
        world: the group of all of them; None: the default group. Its rank 0 makes and renames the directory.
    """

    spreads: Mapping[Axis, Spread] = field(default_factory=lambda: {"tp": Spread()})
    world: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        for axis, spread in self.spreads.items():
            size = spread.num_shards * spread.num_places * spread.num_replicas
            if size != self.world_size:
                factors = f"{axis}({spread.num_shards}) x places({spread.num_places}) x replicas({spread.num_replicas})"
                raise ConversionError(f"export: {factors} = {size} ranks, but {self.world_size} process(es) are joined; give the sizes of the layout")

    def place(self, axis: Axis) -> int:
        """This rank's place for the parameters of an axis, numbered over the axes."""
        return self._offset(axis) + self.spreads[axis].place

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(replicas, shards) of every place."""
        return [(spread.num_replicas, spread.num_shards) for spread in self.spreads.values() for _ in range(spread.num_places)]

    def _offset(self, axis: Axis) -> int:
        before = list(self.spreads)[: list(self.spreads).index(axis)]
        return sum(self.spreads[other].num_places for other in before)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.world) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.world) if dist.is_initialized() else 0


def exchange(value: T, groups: ExportGroups) -> list[T]:
    """One small object from every rank, in rank order. Collective."""
    return _gather(value, groups.world_size, groups.world)


def exchange_shards(value: T, spread: Spread) -> list[T]:
    """One small object from every rank that shares the parameters, in shard order. Collective over the spread's group."""
    return _gather(value, spread.num_shards, spread.group)


def _gather(value: T, count: int, group: dist.ProcessGroup | None) -> list[T]:
    if count == 1:
        return [value]
    gathered: list[T] = [value] * count
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def agree(error: Exception | None, groups: ExportGroups) -> None:
    """Go on together or fail together. Collective.

    Raises:
        Exception: the rank's own ``error``; on the others a ConversionError that names the rank and its error.
    """
    texts = exchange(None if error is None else _text(error), groups)
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise ConversionError(f"rank {rank} failed: {text}")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, MswiftError) else f"{type(error).__name__}: {error}"


def any_failed(failed: bool, spread: Spread) -> bool:
    """Whether a rank failed among those that share the parameters. Collective over the spread's group."""
    if spread.num_shards == 1:
        return failed
    flag = torch.tensor([int(failed)], device=_device(spread))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=spread.group)
    return bool(flag.item())


def gather_shards(shard: torch.Tensor, dim: int | None, owner: int, spread: Spread) -> list[torch.Tensor]:
    """All shards of one parameter on rank ``owner`` of the spread's group, an empty list elsewhere. Collective over that group.

    A parameter that is whole on every rank (``dim`` None) is not sent. Shards travel as bytes, so any dtype keeps its bits.
    """
    if spread.num_shards == 1 or dim is None:
        return [shard] if spread.shard == owner else []
    data = shard.detach().to(_device(spread)).contiguous().reshape(-1).view(torch.uint8)
    assert spread.group is not None
    ranks = dist.get_process_group_ranks(spread.group)
    if spread.shard != owner:
        dist.send(data, ranks[owner], group=spread.group)
        return []
    parts = []
    for number, rank in enumerate(ranks):  # one by one into place: a gather by gloo would hold all of them twice
        part = data if number == owner else torch.empty_like(data)
        if number != owner:
            dist.recv(part, rank, group=spread.group)
        parts.append(part.view(shard.dtype).reshape(shard.shape))
    return parts


def gather_small(tensors: Mapping[str, tuple[torch.Tensor, Shard, Parts]], groups: ExportGroups) -> dict[str, torch.Tensor]:
    """Whole tensors of all places on rank 0, an empty dict elsewhere; for what is small, such as adapters. Collective over the world.

    Args:
        tensors: by name, this rank's ``(local tensor, which part it is, parts)``; names differ between places.
    """
    mine = {
        name: (tensor.detach().cpu(), shard, parts) for name, (tensor, shard, parts) in tensors.items() if groups.spreads[shard.axis].replica == 0
    }
    entries = [mine]
    if groups.world_size > 1:
        received = [mine] * groups.world_size if groups.rank == 0 else None
        dist.gather_object(mine, received, dst=0 if groups.world is None else dist.get_global_rank(groups.world, 0), group=groups.world)
        entries = received or []
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for name, (tensor, shard, _) in (item for held in entries for item in held.items()):
        shards.setdefault(name, {})[shard.rank] = tensor
    form = {name: (shard.dim, parts) for held in entries for name, (_, shard, parts) in held.items()}
    return {name: join([held[rank] for rank in sorted(held)], *form[name]) for name, held in shards.items()}


def _device(spread: Spread) -> torch.device:
    on_gpu = dist.get_backend(spread.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
