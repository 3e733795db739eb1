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

from mswift.conversion.in_turn import Advice, InTurn, Weights, advise, storage_of
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
        max_bytes: of a file; a larger tensor has one of its own. weights: of which the tensors are.
        progress: called after every file with the bytes done and in all, of this rank.
    """

    def __init__(self, directory: Path, max_bytes: int, weights: Weights, progress: Callable[[int, int], None] | None) -> None:
        super().__init__(directory, single_file_per_rank=True, thread_count=1, sync_files=False)
        self._directory, self._max_bytes, self._weights, self._progress = directory, max_bytes, weights, progress
        self.bytes, self.reused, self.num_files = 0, 0, 0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        sizes = {id(item): _nbytes(item) for item in plan.items}
        total, results = sum(sizes.values()), []
        one_by_one = _OneByOne(planner, plan.items, self._weights)
        with ThreadPoolExecutor(1) as behind:
            notes = []
            for number, items in enumerate(_split(plan.items, sizes, self._max_bytes)):
                prefix = f"{plan.storage_data.prefix}{number}_"
                part = replace(plan, items=items, storage_data=replace(plan.storage_data, prefix=prefix))
                note, contents = self._directory / f".{prefix}done", _contents(items)
                written = _read_note(note, contents, part)
                if written is None:
                    written = self._write_part(part, one_by_one)
                    notes.append(behind.submit(_keep, note, contents, written, items))
                else:
                    one_by_one.skip(items)
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


class _OneByOne(DefaultSavePlanner):
    """A planner whose tensors are filled when the writer asks for them and released when it asks for the next, unless that is of the same storage."""

    def __init__(self, planner: SavePlanner, items: list[WriteItem], weights: Weights) -> None:
        super().__init__()
        self._planner, self._weights = planner, weights
        tensors = [data for item in items if isinstance(data := planner.resolve_data(item), torch.Tensor)]
        self._left = Counter(storage_of(data) for data in tensors)
        self._following = {storage_of(one): other for one, other in pairwise(tensors) if storage_of(one) != storage_of(other)}
        self._done: torch.Tensor | None = None
        for data in tensors:  # so that one takes the memory of another, not memory that was never touched
            weights.release(data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        self._end()
        data = self._planner.resolve_data(write_item)
        if isinstance(data, torch.Tensor):
            self._weights.ensure(data)
            if storage_of(data) in self._following:
                self._weights.expect(self._following[storage_of(data)])
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
            key = storage_of(self._done)
            self._left[key] -= 1
            if not self._left[key]:
                self._weights.release(self._done)
            self._done = None


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
            advise(file.fileno(), 0, 0, "done")
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


class _RememberingReader(FileSystemReader):
    """Reads nothing when megatron's planner asks it to, but remembers what; then as much as it is told."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self.plan, self._planner = plan, planner
        self.read([item for item in plan.items if item.type == LoadItemType.BYTE_IO])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def storage_of(self, item: ReadItem) -> int:
        """The storage that an item is read into."""
        return storage_of(self._planner.resolve_tensor(item))

    def read(self, items: list[ReadItem]) -> None:
        super().read_data(replace(self.plan, items=items), self._planner).wait()


class StoredTensors(InTurn):
    """Tensors of a distributed checkpoint, read by each rank alone; made by `load_tensors`."""

    def __init__(self, directory: Path, reader: _RememberingReader) -> None:
        super().__init__()
        self._directory, self._reader = directory, reader
        self._items: dict[int, list[ReadItem]] = {}
        for item in reader.plan.items:
            if item.type == LoadItemType.TENSOR:
                self._items.setdefault(reader.storage_of(item), []).append(item)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are what `fill` fills, whole: a part that the checkpoint does not have is zero."""
        self._watch(tensor for tensor in tensors if storage_of(tensor) in self._items)

    def _read(self, key: int, whole: torch.Tensor) -> None:
        items = self._items[key]
        if sum(math.prod(item.lengths) for item in items) < whole.numel():
            whole.zero_()
        try:
            self._reader.read(items)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self._directory} cannot be read: {reason_of(error)}; convert it again") from error
        alone = [item for item in items if 2 * math.prod(item.lengths) * whole.itemsize > self._place(item).length]
        self._tell(alone, "done")  # the memory is better used for what is written; of the others another rank reads the rest

    def _advise(self, key: int, advice: Advice) -> None:
        self._tell(self._items[key], advice)

    def _tell(self, items: list[ReadItem], advice: Advice) -> None:
        for item in items:
            place = self._place(item)
            with (self._directory / place.relative_path).open("rb") as file:
                advise(file.fileno(), place.offset, place.length, advice)

    def _place(self, item: ReadItem) -> _StorageInfo:
        return self._reader.storage_data[item.storage_index]


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
    reader = _RememberingReader(directory) if deferred else FileSystemReader(directory)
    try:
        with _quiet_loading():
            torch_checkpoint.load(mcore_to_pyt_state_dict(tensors, True), storage_reader=reader, planner=planner)
    except CheckpointException as error:
        raise CheckpointError(f"it cannot be read{_first_failure(error)}") from error
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {reason_of(error)}") from error
    return StoredTensors(directory, reader) if isinstance(reader, _RememberingReader) else None


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
