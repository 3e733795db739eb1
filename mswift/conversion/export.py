"""Exporting: a megatron model spread over ranks to one HF directory, written by all of them, with no full model on any.

Every rank makes the same plan (`export_plan`) from names and shapes. Then the tensor-parallel ranks of each pipeline stage walk its
parameters in one order, and each writes its rows or columns to their place in a file that one of them has made; only where a file holds a
matrix in another order than its rows do the shards meet on one rank. Data-parallel replicas share the files between them. The directory
appears by one rename at the end, or not at all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from mswift.conversion.collective import ExportGroups, Spread, agree, any_failed, exchange, exchange_shards, gather_shards
from mswift.conversion.coverage import fail_on, gap
from mswift.conversion.directories import INDEX_FILE
from mswift.conversion.export_plan import ExportParameter, ExportPlan, cast_of, held_by_places, plan_export
from mswift.conversion.file_plan import OutFile, index_of
from mswift.conversion.formats.settings import QUANTIZATION_KEY
from mswift.conversion.load import Progress
from mswift.conversion.rules import AnyRule, Rule
from mswift.conversion.safetensors_io import ShardWriter
from mswift.conversion.shards import Axis, cut_sources, source_slices
from mswift.conversion.stacks import SlabWriter
from mswift.conversion.staging import (
    SmallFile,
    begin_draft,
    check_space,
    check_target,
    make_temporary,
    missing_files,
    parse_size,
    publish,
    put_files,
)
from mswift.errors import ConversionError

_UNFINISHED = ".part"
_SLACK = 64 * 2**20  # free space for config, tokenizer and index, beyond the weights


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written. ``tensors``, ``bytes``, ``files``, and ``reused`` of an earlier attempt: of the whole model; ``own_bytes``: by this rank."""

    directory: Path
    tensors: int
    bytes: int
    files: int
    own_bytes: int
    seconds: float
    reused: int = 0


def export_model(
    parameters: Iterable[ExportParameter],
    rules: Sequence[AnyRule],
    directory: str | Path,
    *,
    config: Mapping[str, Any] | bytes | Path,
    groups: ExportGroups | None = None,
    extra_files: Iterable[SmallFile] = (),
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    exist_ok: bool = False,
    source: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model as an HF directory: config, safetensors, index, extra files. Collective over ``groups.world``.

    Args:
        parameters: what this rank holds, in the same order on all tensor-parallel ranks and replicas of a stage. rules: of the whole model.
        directory: must not hold anything yet; on a file system that all ranks share.
        config: content of config.json. A mapping gets the written dtype as its ``dtype`` and loses
            ``quantization_config``, for what is written is plain; bytes, or the file at a path, are kept as they are.
        groups: None for one process. extra_files: copied by name, or written (tokenizer, chat template, generation config).
        dtype: cast floating-point tensors to it, rounding once; None keeps every bit.
        max_shard_size: of a file, as ``5GB``. exist_ok: replace an earlier export. progress: after each parameter that this rank writes.
        source: what tells this export from any other (JSON types); with it, finished files survive a failure or a kill. resume: go on with them.

    Raises:
        ConversionError: model and rules disagree, no space, something would be overwritten, or any rank failed. No rank returns then, and
            the target is as it was.
    """
    begun, groups, target = time.perf_counter(), groups or ExportGroups(), Path(directory)
    local, copies = list(parameters), list(extra_files)
    plan = plan_export(held_by_places(local, groups), rules, dtype=dtype, max_bytes=parse_size(max_shard_size), sizes=groups.sizes)
    identity = None if source is None else {**source, "files": plan.digest()}
    temporary = _begin(target, plan.nbytes, exist_ok, copies, groups, identity, resume)
    finished = exchange({path.name for path in temporary.glob("*.safetensors")} if groups.rank == 0 else set(), groups)[0]
    try:
        walk = _Walk(plan, temporary, groups, dtype, progress, finished)
        walk.run(local)
        _finish(temporary, target, plan, config, copies, groups)
    except ConversionError as error:
        if source is not None and _has_finished(temporary):
            raise ConversionError(f"{error}; finished files are kept: the same command with --resume true goes on") from error
        raise
    finally:
        if groups.rank == 0 and (source is None or not _has_finished(temporary)):
            shutil.rmtree(temporary, ignore_errors=True)
    return ExportReport(target, plan.num_tensors, plan.nbytes, len(plan.files), walk.done, time.perf_counter() - begun, len(finished))


def _has_finished(temporary: Path) -> bool:
    return any(temporary.glob("*.safetensors"))


class _Walk:
    """One rank's way through its parameters. An error is kept until the others can know of it, so that collectives stay in step."""

    def __init__(
        self, plan: ExportPlan, temporary: Path, groups: ExportGroups, dtype: torch.dtype | None, progress: Progress | None, finished: set[str]
    ) -> None:
        plan = replace(plan, files=[file for file in plan.files if file.name not in finished])
        self._plan, self._groups, self._dtype, self._progress = plan, groups, dtype, progress
        self._temporary = temporary
        spots = {groups.place(axis): spread for axis, spread in groups.spreads.items()}
        self._files = [file for file in plan.files if file.place in spots and _makes(file, spots[file.place])]
        self._joined = [file for file in plan.files if file not in self._files and _writes_into(file, spots)]
        self._writers: dict[str, ShardWriter] = {}  # by HF tensor
        self._slabs = SlabWriter()
        self._error: Exception | None = None
        self._stopped = False
        writers = {file.name: sum(groups.sizes[place][1] for place in (file.place, *file.helpers)) for file in plan.files}
        self._shared = any(count > 1 for count in writers.values())
        self.done, self.total = 0, sum(file.nbytes // writers[file.name] for file in self._files + self._joined)

    def run(self, parameters: Sequence[ExportParameter]) -> None:
        """Write this rank's part of all files that it has a part of. Collective; raises on every rank if one failed."""
        with self._kept():
            self._open(self._files, join=False)
        if self._shared:
            agree(self._error, self._groups)  # a file is there before others open it
            with self._kept():
                self._open(self._joined, join=True)
        for axis in self._groups.spreads:
            self._walk(axis, [parameter for parameter in parameters if parameter.shard.axis == axis])
        self._close()
        agree(self._error, self._groups)
        if self._progress is not None and self.done != self.total:  # of what all ranks hold, one writes all
            self._progress(self.done, self.done)

    def _open(self, files: Iterable[OutFile], *, join: bool) -> None:
        for file in files:
            writer = ShardWriter(self._temporary / f"{file.name}{_UNFINISHED}", file.specs, join=join)
            self._writers.update(dict.fromkeys(file.specs, writer))

    def _close(self) -> None:
        writers = list(dict.fromkeys(self._writers.values()))
        others: list[dict[str, int]] = []
        if self._shared:
            others = exchange({name: count for writer in writers if writer.joined for name, count in writer.written.items()}, self._groups)
        for writer in writers:
            with self._kept():
                if self._stopped or self._error is not None:
                    writer.discard()
                else:
                    self._end(writer, others)

    def _end(self, writer: ShardWriter, others: Iterable[Mapping[str, int]] = ()) -> None:
        """A file has its own name only once it is whole."""
        writer.close(others)
        if not writer.joined:
            writer.path.rename(writer.path.with_name(writer.path.name.removesuffix(_UNFINISHED)))

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # raised again by `agree`, on all ranks together
            self._error = self._error or error

    def _walk(self, axis: Axis, parameters: Iterable[ExportParameter]) -> None:
        """The parameters of one axis, up to the first failure in the group that shares them."""
        spread, place = self._groups.spreads[axis], self._groups.place(axis)
        rules, shard_of = self._plan.rules[place], self._plan.writers_of(place, spread.replica)
        steps = [(parameter, rule) for parameter in parameters if (rule := rules.get(parameter.name)) and shard_of.keys() & rule.sources]
        alone = [file for file in self._plan.files if (file.place, file.replica) == (place, spread.replica) and not file.helpers]
        file_of = {name: file for file in alone for name in file.specs}
        left = Counter(file_of[name].name for _, rule in steps for name in rule.sources if name in file_of)
        for (parameter, rule), following in zip_longest(steps, steps[1:]):
            if following is not None:
                following[0].expect()
            going_on = self._step(parameter, rule, shard_of, spread)
            for name in rule.sources if going_on else ():
                if name in file_of:
                    left[file_of[name].name] -= 1
                    going_on = going_on and (left[file_of[name].name] > 0 or self._end_together(file_of[name], spread))
            if not going_on:
                self._stopped = True  # told to the other group at its first step
                return

    def _end_together(self, file: OutFile, spread: Spread) -> bool:
        """End a file whose last tensor has been written; False if a rank of the group has failed."""
        writer = self._writers.get(next(iter(file.specs)))
        counts = exchange_shards(None if self._error is not None or writer is None else writer.written, spread)
        if writer is None or any(count is None for count in counts):
            return False
        for name in file.specs:
            del self._writers[name]
        with self._kept():
            self._end(writer, [count for number, count in enumerate(counts) if number != spread.shard and count is not None])
        return True

    def _step(self, parameter: ExportParameter, rule: Rule, shard_of: Mapping[str, int], spread: Spread) -> bool:
        """Write one parameter; False if a rank of the group has failed."""
        value = torch.empty(0)
        with self._kept():
            value = parameter.value()
            if tuple(value.shape) != parameter.shape:
                raise ConversionError(f"{parameter.name} should have shape {parameter.shape}, its value has {tuple(value.shape)}")
            value = value.to(cast_of(parameter.dtype, self._dtype))
        if any_failed(self._stopped or self._error is not None, spread):
            return False
        if rule.stack is None or rule.stack.plain:
            with self._kept():
                self._write_part(rule, parameter, value, shard_of, spread)
        else:
            for owner in sorted({shard_of[name] for name in rule.sources if name in shard_of}):
                shards = gather_shards(value, parameter.shard.dim, owner, spread)
                if shards:
                    with self._kept():
                        self._write_slabs(rule, parameter, shards)
        with self._kept():
            parameter.release()
        if self._progress is not None:
            self._progress(self.done, max(self.done, self.total))
        return True

    def _write_part(self, rule: Rule, parameter: ExportParameter, value: torch.Tensor, shard_of: Mapping[str, int], spread: Spread) -> None:
        """This rank's rows or columns; all of a parameter that every rank holds, where the rank has made the file."""
        shape, whole = parameter.whole.shape, parameter.shard.dim is None
        for part in source_slices(rule.pieces(rule.source_shapes(shape)), parameter.shard, shape, rule.parts, rule.source_columns):
            if part.source is None or part.source not in self._writers or (whole and shard_of[part.source] != spread.shard):
                continue
            rows = value[part.at : part.at + part.rows]
            if part.columns is not None:
                rows = rows[:, : part.columns[1] - part.columns[0]]
            self.done += self._writers[part.source].write(part.source, rows, part.start, part.columns)

    def _write_slabs(self, rule: Rule, parameter: ExportParameter, shards: list[torch.Tensor]) -> None:
        shapes = rule.source_shapes(parameter.whole.shape)
        dim = parameter.shard.dim if len(shards) > 1 else None
        for source, row, values in cut_sources(rule.pieces(shapes), shards, dim, rule.parts, rule.source_columns):
            writer = self._writers.get(source)
            if writer is not None:
                for first, ready in self._slabs.add(source, rule.stack, shapes[source], row, values):
                    self.done += writer.write(source, ready, first)


def _makes(file: OutFile, spread: Spread) -> bool:
    """Whether a rank that stands there in the file's place is the one that makes it."""
    return (file.replica, file.shard) == (spread.replica, spread.shard)


def _writes_into(file: OutFile, spots: Mapping[int, Spread]) -> bool:
    """Whether a rank that stands there holds a part of the file's tensors."""
    own = file.place in spots and spots[file.place].replica == file.replica
    return own or any(place in spots and spots[place].replica == 0 for place in file.helpers)


def _begin(
    target: Path,
    nbytes: int,
    exist_ok: bool,
    copies: Sequence[SmallFile],
    groups: ExportGroups,
    identity: dict[str, Any] | None,
    resume: bool,
) -> Path:
    """Check what can be checked and make the temporary directory, on rank 0; returns its path on every rank. Collective."""
    error: ConversionError | None = None
    made: Path | None = None
    if groups.rank == 0:
        try:
            made = _prepare(target, nbytes, exist_ok, copies, identity, resume)
        except ConversionError as failure:
            error = failure
    agree(error, groups)
    temporary = exchange(made, groups)[0]
    assert temporary is not None
    try:
        agree(None if temporary.is_dir() else _unseen(temporary), groups)
    except ConversionError:
        if groups.rank == 0 and identity is None:
            temporary.rmdir()
        raise
    return temporary


def _unseen(temporary: Path) -> ConversionError:
    return ConversionError(f"{temporary} is not seen by this rank; the output directory must be on a file system that all nodes share")


def _prepare(target: Path, nbytes: int, exist_ok: bool, copies: Sequence[SmallFile], identity: dict[str, Any] | None, resume: bool) -> Path:
    fail_on(gap("file to copy", missing_files(copies), "not found"), f"export to {target}")
    check_target(target, exist_ok)
    if identity is not None:
        draft = begin_draft(target, identity, resume)
        for path in draft.glob(f"*{_UNFINISHED}"):
            path.unlink()
        check_space(draft, nbytes + _SLACK - sum(path.stat().st_size for path in draft.iterdir()))
        return draft
    temporary = make_temporary(target)
    try:
        check_space(temporary, nbytes + _SLACK)
    except ConversionError:
        temporary.rmdir()
        raise
    return temporary


def _finish(
    temporary: Path, target: Path, plan: ExportPlan, config: Mapping[str, Any] | bytes | Path, copies: Sequence[SmallFile], groups: ExportGroups
) -> None:
    """The small files and the rename, on rank 0. Collective."""
    error: ConversionError | None = None
    if groups.rank == 0:
        try:
            (temporary / "config.json").write_bytes(_config_bytes(config, plan))
            if len(plan.files) > 1:
                (temporary / INDEX_FILE).write_text(json.dumps(index_of(plan.files), indent=2) + "\n")
            put_files(copies, temporary)
            publish(temporary, target)
        except ConversionError as failure:
            error = failure
        except OSError as failure:
            error = ConversionError(f"cannot write {target}: {failure.strerror}; free some space or choose another directory")
    agree(error, groups)


def _config_bytes(config: Mapping[str, Any] | bytes | Path, plan: ExportPlan) -> bytes:
    if isinstance(config, bytes):
        return config
    if isinstance(config, Path):
        return config.read_bytes()
    sizes: Counter[torch.dtype] = Counter()
    for file in plan.files:
        for spec in file.specs.values():
            sizes[spec.dtype] += spec.nbytes
    written = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    return (json.dumps(plain_config(config, written), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Content of a config.json for plain weights of ``dtype``."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    plain = {key: value for key, value in config.items() if key != QUANTIZATION_KEY} | dict.fromkeys(keys, dtype)
    text = plain.get("text_config")
    if isinstance(text, dict) and "dtype" in text:
        plain["text_config"] = {**text, "dtype": dtype}
    return plain


def with_field(config: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Content of a config.json with another value, also in what it says of a text part if that has one."""
    text = config.get("text_config")
    part = {"text_config": {**text, name: value}} if isinstance(text, dict) and name in text else {}
    return {**config, **part, name: value}
