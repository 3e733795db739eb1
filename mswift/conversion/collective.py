"""The few things that exporting ranks say to each other: who failed, a path, and the shards of one parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from mswift.conversion.shards import join
from mswift.errors import ConversionError, MswiftError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExportGroups:
    """Where this rank stands among those that hold one model.

    Args:
        tp_group: process group of the tensor-parallel ranks, in shard order; None for one rank.
        stage, num_stages: pipeline position (a rank with several virtual stages has one position).
        replica, num_replicas: which copy of the stage (data and context parallel together).
        world: the group of all of them; None: the default group. Its rank 0 makes and renames the directory.
    """

    tp_group: dist.ProcessGroup | None = None
    tp_rank: int = 0
    tp_size: int = 1
    stage: int = 0
    num_stages: int = 1
    replica: int = 0
    num_replicas: int = 1
    world: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        size = self.tp_size * self.num_stages * self.num_replicas
        if size != self.world_size:
            factors = f"tp({self.tp_size}) x stages({self.num_stages}) x replicas({self.num_replicas})"
            raise ConversionError(f"export: {factors} = {size} ranks, but {self.world_size} process(es) are joined; give the sizes of the layout")

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.world) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.world) if dist.is_initialized() else 0


def exchange(value: T, groups: ExportGroups) -> list[T]:
    """One small object from every rank, in rank order. Collective."""
    if groups.world_size == 1:
        return [value]
    gathered: list[T] = [value] * groups.world_size
    dist.all_gather_object(gathered, value, group=groups.world)
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


def any_failed(failed: bool, groups: ExportGroups) -> bool:
    """Whether a rank of the tensor-parallel group failed. Collective over that group."""
    if groups.tp_size == 1:
        return failed
    flag = torch.tensor([int(failed)], device=_device(groups))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=groups.tp_group)
    return bool(flag.item())


def gather_shards(shard: torch.Tensor, dim: int | None, owner: int, groups: ExportGroups) -> list[torch.Tensor]:
    """All shards of one parameter on tensor-parallel rank ``owner``, an empty list elsewhere. Collective over that group.

    A parameter that is whole on every rank (``dim`` None) is not sent. Shards travel as bytes, so any dtype keeps its bits.
    """
    if groups.tp_size == 1 or dim is None:
        return [shard] if groups.tp_rank == owner else []
    data = shard.detach().to(_device(groups)).contiguous().reshape(-1).view(torch.uint8)
    parts = [torch.empty_like(data) for _ in range(groups.tp_size)] if groups.tp_rank == owner else None
    assert groups.tp_group is not None
    dist.gather(data, parts, dst=dist.get_global_rank(groups.tp_group, owner), group=groups.tp_group)
    return [part.view(shard.dtype).reshape(shard.shape) for part in parts or []]


def gather_small(tensors: Mapping[str, tuple[torch.Tensor, int | None, int]], groups: ExportGroups) -> dict[str, torch.Tensor]:
    """Whole tensors of all stages on rank 0, an empty dict elsewhere; for what is small, such as adapters. Collective over the world.

    Args:
        tensors: by name, this rank's ``(local tensor, dim that it is split along or None, parts)``; names differ between stages.
    """
    mine = {name: (tensor.detach().cpu(), dim, parts) for name, (tensor, dim, parts) in tensors.items()} if groups.replica == 0 else {}
    entry = (groups.stage, groups.tp_rank, mine)
    entries = [entry]
    if groups.world_size > 1:
        received = [entry] * groups.world_size if groups.rank == 0 else None
        dist.gather_object(entry, received, dst=0 if groups.world is None else dist.get_global_rank(groups.world, 0), group=groups.world)
        entries = received or []
    whole: dict[str, torch.Tensor] = {}
    for stage in range(groups.num_stages):
        held = [named for place, _, named in sorted(entries, key=lambda item: item[:2]) if place == stage and named]
        for name, (_, dim, parts) in held[0].items() if held else ():
            whole[name] = join([named[name][0] for named in held], dim, parts)
    return whole


def _device(groups: ExportGroups) -> torch.device:
    on_gpu = dist.get_backend(groups.tp_group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
