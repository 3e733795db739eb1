"""Process groups of a `ParallelLayout`: made once, then passed; nothing else asks megatron-core's globals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mswift.errors import LayoutError
from mswift.parallel.layout import ParallelLayout, RankCoords


@dataclass(frozen=True)
class Groups:
    """The groups of this rank and where it stands in them.

    Args:
        layout: the layout that they were made from. rank: global rank. coords: place on the mesh.
        collection: megatron-core's ProcessGroupCollection, to be passed to its modules.
    """

    layout: ParallelLayout
    rank: int
    coords: RankCoords
    collection: Any

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def is_first_stage(self) -> bool:
        return self.coords.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coords.pp == self.layout.pp - 1


def make_groups(layout: ParallelLayout, *, gloo: bool = True) -> Groups:
    """Make megatron-core's process groups for `layout` in an initialised world.

    Args:
        gloo: also the groups of gloo that megatron-core wants beside those of NCCL.

    Raises:
        LayoutError: the layout was made for another number of processes.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    world = dist.get_world_size()
    if layout.world != world:
        raise LayoutError(f"the layout {layout.describe()} was made for {layout.world} process(es), {world} are running")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        create_gloo_process_groups=gloo,
    )
    rank = dist.get_rank()
    return Groups(layout, rank, layout.coords(rank), ProcessGroupCollection.use_mpu_process_groups())
