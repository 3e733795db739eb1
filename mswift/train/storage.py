"""megatron-core's sharded state on disk, through torch.distributed.checkpoint, in the format that megatron-core itself reads.

megatron-core's own writer starts a manager process for every save and forks writers, which processes with collectives in flight do not
bear well; and an error of rank 0 between its steps leaves the others waiting. This one writes in the process itself, and an error of any
rank is raised on all.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException

from mswift.errors import CheckpointError
from mswift.log import is_main_process
from mswift.train.agree import agree, attempt, reason_of

_COMMON_FILE = "common.pt"


def save_state(state: dict[str, Any], directory: Path, what: str) -> None:
    """Write a sharded state into a new directory; all ranks call it.

    Args:
        what: names the doing in an error, such as ``saving checkpoint-10``.

    Raises:
        CheckpointError: a rank could not write; on all ranks.
    """
    sharded, common = save_preprocess(state, False)

    def write_common() -> None:
        if is_main_process():
            directory.mkdir(parents=True)
            buffer = io.BytesIO()  # torch would tell a full disk in words of its own
            torch.save(common, buffer)
            (directory / _COMMON_FILE).write_bytes(buffer.getbuffer())
            save_config(CheckpointingConfig("torch_dist", 1), str(directory))

    agree(attempt(write_common), what)
    tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    writer = torch_checkpoint.FileSystemWriter(directory, single_file_per_rank=True, thread_count=1)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    try:
        torch_checkpoint.save(mcore_to_pyt_state_dict(tensors, False), storage_writer=writer, planner=planner)
    except CheckpointException as error:  # on all ranks
        raise CheckpointError(f"{what} failed{_first_failure(error)}") from error


def load_state(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The tensors that `state` describes, read from a directory that `save_state` wrote, in any layout.

    Raises:
        CheckpointError: a rank could not read; its text is the reason alone.
    """
    try:
        with _quiet_loading():
            return dist_checkpointing.load(state, str(directory))
    except CheckpointException as error:
        raise CheckpointError(f"it cannot be read{_first_failure(error)}") from error
    except Exception as error:  # megatron-core and torch each raise their own kinds, and plain ones
        raise CheckpointError(f"it cannot be read: {reason_of(error).split('. ')[0]}") from error


def _first_failure(error: CheckpointException) -> str:
    """`` on rank 1: OSError: ...``; the rank only where there are several."""
    rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
    several = torch.distributed.get_world_size() > 1
    cut_short = isinstance(failure, RuntimeError) and "inline_container" in str(failure)  # the zip writer's way to say that a write failed
    reason = "a file could not be written to its end (is the disk full?)" if cut_short else reason_of(failure).split(". ")[0]
    return f"{f' on rank {rank}' if several else ''}: {reason}"


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """torch prints its way to an error that is raised anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # some of it comes from the root logger
    try:
        yield
    finally:
        logging.disable(before)
