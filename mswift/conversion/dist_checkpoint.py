"""megatron-core's sharded state on disk, through torch.distributed.checkpoint, in the format (``torch_dist``) that megatron-core itself reads.

megatron-core's own writer starts a manager process for every save and forks writers, which processes with collectives in flight do not
bear well; and an error of rank 0 between its steps leaves the others waiting. This one writes in the process itself, and an error of any
rank is raised on all.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo  # megatron-core reads these too
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from mswift.conversion.safetensors_io import bytes_of
from mswift.conversion.staging import replace_file
from mswift.errors import CheckpointError
from mswift.log import is_main_process
from mswift.parallel.agree import agree, attempt, reason_of

_COMMON_FILE = "common.pt"


def save_state(state: dict[str, Any], directory: Path, what: str, *, writer: FileSystemWriter | None = None) -> None:
    """Write a sharded state into a directory; all ranks call it.

    Args:
        directory: new, but for what an earlier `PartsWriter` left there. what: names the doing in an error, such as ``saving checkpoint-10``.
        writer: how; None: one file of each rank.

    Raises:
        CheckpointError: a rank could not write; on all ranks.
    """
    sharded, common = save_preprocess(state, False)

    def write_common() -> None:
        if is_main_process():
            directory.mkdir(parents=True, exist_ok=writer is not None)
            buffer = io.BytesIO()  # torch would tell a full disk in words of its own
            torch.save(common, buffer)
            (directory / _COMMON_FILE).write_bytes(buffer.getbuffer())
            save_config(CheckpointingConfig("torch_dist", 1), str(directory))

    agree(attempt(write_common), what)
    tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    writer = writer or FileSystemWriter(directory, single_file_per_rank=True, thread_count=1)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    try:
        torch_checkpoint.save(mcore_to_pyt_state_dict(tensors, False), storage_writer=writer, planner=planner)
    except CheckpointException as error:  # on all ranks
        raise CheckpointError(f"{what} failed{_first_failure(error)}") from error


class PartsWriter(FileSystemWriter):
    """Writes a rank's tensors in files of limited size, and remembers every finished one, so that a killed writer goes on where it was.

    One tensor is in memory at a time, and the disk takes a file in while those of the next are read.

    Args:
        max_bytes: of a file; a larger tensor has one of its own. fill: makes sure that a tensor holds its values, called just before it is written.
        release: called with a tensor once nothing more of its storage is to be written. expect: with the one that is filled next.
        progress: called after every file with the bytes done and in all, of this rank.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        fill: Callable[[torch.Tensor], None],
        release: Callable[[torch.Tensor], None],
        expect: Callable[[torch.Tensor], None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        super().__init__(directory, single_file_per_rank=True, thread_count=1, sync_files=False)
        self._directory, self._max_bytes, self._progress = directory, max_bytes, progress
        self._fill, self._release, self._expect = fill, release, expect
        self.bytes, self.reused, self.num_files = 0, 0, 0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        sizes = {id(item): _nbytes(item) for item in plan.items}
        total, results = sum(sizes.values()), []
        in_turn = _InTurn(planner, plan.items, self._fill, self._release, self._expect)
        with ThreadPoolExecutor(1) as behind:
            notes = []
            for number, items in enumerate(_split(plan.items, sizes, self._max_bytes)):
                prefix = f"{plan.storage_data.prefix}{number}_"
                part = replace(plan, items=items, storage_data=replace(plan.storage_data, prefix=prefix))
                note, contents = self._directory / f".{prefix}done", _contents(items)
                written = _read_note(note, contents, part)
                if written is None:
                    written = self._write_part(part, in_turn)
                    notes.append(behind.submit(_keep, note, contents, written, items))
                else:
                    in_turn.skip(items)
                    self.reused += 1
                results += written
                self.bytes += sum(sizes[id(item)] for item in items)
                self.num_files += 1
                if self._progress is not None:
                    self._progress(self.bytes, total)
            for waiting in notes:
                waiting.result()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_part(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        before = get_crc32_options()
        set_crc32_options(False)  # a third of the time, and no reader looks at them
        try:
            return super().write_data(plan, planner).wait()
        finally:
            set_crc32_options(before)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        for note in self._directory.glob(".*_done"):
            note.unlink()


class _InTurn(DefaultSavePlanner):
    """A planner whose tensors are filled when the writer asks for them and released when it asks for the next, unless that is of the same storage."""

    def __init__(
        self,
        planner: SavePlanner,
        items: list[WriteItem],
        fill: Callable[[torch.Tensor], None],
        release: Callable[[torch.Tensor], None],
        expect: Callable[[torch.Tensor], None],
    ) -> None:
        super().__init__()
        self._planner, self._fill, self._release, self._expect = planner, fill, release, expect
        tensors = [data for item in items if isinstance(data := planner.resolve_data(item), torch.Tensor)]
        self._left = Counter(_storage(data) for data in tensors)
        self._following = {_storage(one): other for one, other in pairwise(tensors) if _storage(one) != _storage(other)}
        self._done: torch.Tensor | None = None
        for data in tensors:  # so that one takes the memory of another, not memory that was never touched
            release(data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        self._end()
        data = self._planner.resolve_data(write_item)
        if isinstance(data, torch.Tensor):
            self._fill(data)
            if _storage(data) in self._following:
                self._expect(self._following[_storage(data)])
            self._done = data
            if data.is_cpu and data.is_contiguous() and data.numel() and data.untyped_storage().size() != data.nbytes:
                return torch.frombuffer(bytes_of(data), dtype=data.dtype).view(data.shape)  # torch would copy what is a part of a storage
        return data

    def skip(self, items: Iterable[WriteItem]) -> None:
        """These are not written."""
        for item in items:
            data = self._planner.resolve_data(item)
            self._done = data if isinstance(data, torch.Tensor) else None
            self._end()

    def _end(self) -> None:
        if self._done is not None:
            key = _storage(self._done)
            self._left[key] -= 1
            if not self._left[key]:
                self._release(self._done)
            self._done = None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _split(items: list[WriteItem], sizes: Mapping[int, int], max_bytes: int) -> list[list[WriteItem]]:
    """Consecutive items in groups of at most `max_bytes`."""
    groups: list[list[WriteItem]] = []
    size = 0
    for item in items:
        if not groups or size + sizes[id(item)] > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += sizes[id(item)]
    return groups


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _contents(items: list[WriteItem]) -> str:
    """The same for two parts that hold the same pieces of the same tensors."""
    return hashlib.sha256(repr([(item.index, item.type, item.tensor_data) for item in items]).encode()).hexdigest()


def _keep(note: Path, contents: str, results: list[WriteResult], items: list[WriteItem]) -> None:
    """Note that a part is finished, once the disk has it."""
    found = {result.index: result for result in results}
    entries = [[entry.size_in_bytes, *_place(entry.storage_data)] for entry in (found[item.index] for item in items)]
    for path in {str(entry[1]) for entry in entries}:
        with (note.parent / path).open("rb") as file:
            os.fsync(file.fileno())
    replace_file(note, json.dumps([contents, entries]))


def _place(info: _StorageInfo) -> tuple[str, int, int]:
    return info.relative_path, info.offset, info.length


def _read_note(note: Path, contents: str, plan: SavePlan) -> list[WriteResult] | None:
    """What was written of a part, if it is all there and is the same part; else None."""
    try:
        written, entries = json.loads(note.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    if written != contents:
        return None
    results = [
        WriteResult(index=item.index, size_in_bytes=size, storage_data=_StorageInfo(path, offset, length))
        for item, (size, path, offset, length) in zip(plan.items, entries, strict=True)
    ]
    ends: dict[str, int] = {}
    for _, path, offset, length in entries:
        ends[path] = max(ends.get(path, 0), offset + length)
    whole = all((note.parent / path).is_file() and (note.parent / path).stat().st_size >= end for path, end in ends.items())
    return results if whole else None


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


class StoredTensors(FileSystemReader):
    """Tensors of a distributed checkpoint that are read when they are asked for, by each rank alone; made by `load_tensors`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory
        self._items: dict[int, list[ReadItem]] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._waiting: set[int] = set()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self._plan, self._planner = plan, planner
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                super().read_data(replace(plan, items=[item]), planner)
            else:
                self._items.setdefault(_storage(planner.resolve_tensor(item)), []).append(item)
        self._waiting = set(self._items)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are what `fill` fills, whole: a part that the checkpoint does not have is zero."""
        self._tensors = {_storage(tensor): tensor for tensor in tensors}

    def fill(self, tensor: torch.Tensor) -> None:
        """Read the tensor that this one is, or is a view of, if it has not been read.

        Raises:
            CheckpointError: it cannot be read.
        """
        key = _storage(tensor)
        if key not in self._waiting:
            return
        self._waiting.remove(key)
        whole = self._tensors[key]
        if not whole.untyped_storage().size():
            whole.untyped_storage().resize_(whole.nbytes)
        items = self._items[key]
        if sum(math.prod(item.lengths) for item in items) < whole.numel():
            whole.zero_()
        try:
            super().read_data(replace(self._plan, items=items), self._planner).wait()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self._directory} cannot be read: {reason_of(error)}; convert it again") from error
        alone = [item for item in items if 2 * math.prod(item.lengths) * whole.itemsize > self.storage_data[item.storage_index].length]
        self._advise(alone, os.POSIX_FADV_DONTNEED)  # the memory is better used for what is written; of the others another rank reads the rest

    def expect(self, tensor: torch.Tensor) -> None:
        """`fill` will be called for this one next."""
        key = _storage(tensor)
        if key in self._waiting:
            self._advise(self._items[key], os.POSIX_FADV_WILLNEED)

    def _advise(self, items: list[ReadItem], advice: int) -> None:
        for item in items:
            place = self.storage_data[item.storage_index]
            with (self._directory / place.relative_path).open("rb") as file:
                os.posix_fadvise(file.fileno(), place.offset, place.length, advice)

    def release(self, tensor: torch.Tensor) -> None:
        """Give back the memory of the tensor that this one is, or is a view of; `fill` reads it again."""
        key = _storage(tensor)
        whole = self._tensors.get(key)
        if whole is not None and key in self._items and whole.untyped_storage().size() == whole.nbytes:
            whole.untyped_storage().resize_(0)
            self._waiting.add(key)


def load_tensors(state: dict[str, Any], directory: Path, *, deferred: bool = False) -> StoredTensors | None:
    """Fill the tensors of a sharded state in place: unlike `load_state`, without a second copy of any; all ranks call it.

    Args:
        deferred: check everything and read nothing yet; gives what reads them.

    A stored tensor that is larger or smaller than the state's is allowed where ``allow_shape_mismatch`` says so: what is common is read, the
    rest is zero.

    Raises:
        CheckpointError: a rank could not read, a tensor is missing, or has another shape; its text is the reason alone.
    """
    apply_factories(state)
    tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(extract_sharded_base(state)[0])
    every = [shard for shards in tensors.values() for shard in shards if isinstance(shard, ShardedTensor)]
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[shard for shard in every if not shard.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={shard.key: shard for shard in every if shard.allow_shape_mismatch},
    )
    reader = StoredTensors(directory) if deferred else FileSystemReader(directory)
    try:
        with _quiet_loading():
            torch_checkpoint.load(mcore_to_pyt_state_dict(tensors, True), storage_reader=reader, planner=planner)
    except CheckpointException as error:
        raise CheckpointError(f"it cannot be read{_first_failure(error)}") from error
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {reason_of(error)}") from error
    return reader if isinstance(reader, StoredTensors) else None


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The whole shape of every tensor of a distributed checkpoint, by key.

    Raises:
        CheckpointError: there is none, or its index is damaged.
    """
    try:
        metadata = FileSystemReader(directory).read_metadata()
    except Exception as error:  # a pickle: each kind of damage is another kind of error
        raise CheckpointError(f"{directory} is not a finished distributed checkpoint: {reason_of(error)}; convert it again") from error
    return {key: tuple(entry.size) for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
