"""Writing megatron-core's sharded state through torch.distributed.checkpoint, in the format that megatron-core itself reads.

megatron-core's own writer starts a manager process for every save and forks writers, which processes with collectives in flight do not
bear well. This one writes in the process itself, and an error of any rank is raised on all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's ``torch_dist`` format, written by torch's own file writer."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        writer = torch_checkpoint.FileSystemWriter(checkpoint_dir, single_file_per_rank=True, thread_count=1)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        torch_checkpoint.save(mcore_to_pyt_state_dict(state, False), storage_writer=writer, planner=planner)


def save_state(state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state; all ranks call it.

    Raises:
        CheckpointException: a rank could not write; on all ranks.
    """
    dist_checkpointing.save(state, str(directory), sharded_strategy=InProcessSave(), validate_access_integrity=False)


def load_state(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The tensors that `state` describes, read from a directory that `save_state` wrote, in any layout."""
    return dist_checkpointing.load(state, str(directory))
