"""Loading: a rank's shards of a megatron model, filled from an HF checkpoint; everything is checked before the first byte is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from mswift.conversion.coverage import drops_of, fail_on, gaps, rules_by_target
from mswift.conversion.in_turn import Advice, InTurn, storage_of
from mswift.conversion.rules import AnyRule, Drop, Rule, Stack
from mswift.conversion.safetensors_io import TensorReader
from mswift.conversion.shards import Shard, SourceSlice, source_slices
from mswift.conversion.stacks import read_rows
from mswift.errors import ConversionError

Progress = Callable[[int, int], None]  # bytes done and bytes in all, of this rank

_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_COMPARE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """This rank's part of one megatron parameter or buffer, under its name in the whole model; ``tensor`` is written in place."""

    name: str
    tensor: torch.Tensor
    shard: Shard


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded on this rank. ``casts``: how many tensors changed type, such as ``{"bfloat16 -> float32": 12}``."""

    tensors: int
    bytes: int
    seconds: float
    casts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Task:
    parameter: LocalParameter
    slices: list[SourceSlice]
    stack: Stack | None
    dtypes: set[torch.dtype]

    def nbytes(self, reader: TensorReader) -> int:
        width = self.parameter.tensor[0].numel() if self.parameter.tensor.numel() else 0
        return sum(part.rows * width * reader.dtype(part.source).itemsize for part in self.slices if part.source is not None)


class LoadPlan(InTurn):
    """What is read from where into this rank's parameters: checked as a whole, then done at once or parameter by parameter. See `plan_load`.

    Args:
        left_out: how many tensors of the whole checkpoint are dropped although something is lost, by what they are.

    Attributes:
        once: nothing of the checkpoint will be read again soon, so that the page cache need not keep it: a conversion's memory is better used
            for what it writes.
    """

    def __init__(self, tasks: list[_Task], reader: TensorReader, left_out: dict[str, int]) -> None:
        super().__init__()
        self.once = False
        self._tasks, self.reader, self.left_out = tasks, reader, left_out
        self._by_storage = {storage_of(task.parameter.tensor): task for task in tasks if task.parameter.tensor.numel()}
        self._watch(task.parameter.tensor for task in self._by_storage.values())
        self._devices: dict[str, torch.device] = {}
        self.total, self.done = sum(task.nbytes(reader) for task in tasks), 0

    def stored_in(self, dtype: torch.dtype) -> set[str]:
        """Parameters of this rank that the checkpoint has in `dtype` and the model in another."""
        return {task.parameter.name for task in self._tasks if task.dtypes == {dtype} and task.parameter.tensor.dtype != dtype}

    def _read(self, key: int, whole: torch.Tensor) -> None:
        task = self._by_storage[key]
        fill(whole, task.slices, self.reader, task.stack)
        self.done += task.nbytes(self.reader)
        if self.once:
            self._advise(key, "done")

    def _advise(self, key: int, advice: Advice) -> None:
        task = self._by_storage[key]
        for part in task.slices:
            if part.source is not None and part.columns is None and task.stack is None:  # other ranks may read the rest of these rows
                self.reader.advise(part.source, slice(part.start, part.stop), advice)

    def read(self, name: str) -> torch.Tensor:
        """The values of a parameter of this rank, read now, in memory of their own."""
        task = next(task for task in self._tasks if task.parameter.name == name)
        values = torch.empty_like(task.parameter.tensor, device=self._devices.get(name))
        fill(values, task.slices, self.reader, task.stack)
        return values

    def forget(self, name: str) -> None:
        """Let go of the memory of a parameter, which is not read any more but by `read`."""
        index = next(index for index, task in enumerate(self._tasks) if task.parameter.name == name)
        task, own = self._tasks[index], self._tasks[index].parameter.tensor
        key = storage_of(own)
        self._by_storage.pop(key, None)
        if self._whole.pop(key, None) is not None and key in self._waiting:
            self._waiting.remove(key)
            self.done += task.nbytes(self.reader)
        self._devices[name] = own.device
        self._tasks[index] = replace(task, parameter=replace(task.parameter, tensor=torch.empty_like(own, device="meta")))

    def fill_all(self, progress: Progress | None = None) -> LoadReport:
        """Read all that is left; ``progress`` is called after every parameter."""
        begun = time.perf_counter()
        for task in self._tasks:
            self.fill(task.parameter.tensor)
            if progress is not None:
                progress(self.done, self.total)
        casts = [
            f"{_short(dtype)} -> {_short(own)}" for task in self._tasks for own in (task.parameter.tensor.dtype,) for dtype in task.dtypes - {own}
        ]
        counts = {cast: casts.count(cast) for cast in sorted(set(casts))}
        return LoadReport(len(self._tasks), self.done, time.perf_counter() - begun, counts)


def load_weights(
    parameters: Iterable[LocalParameter],
    rules: Sequence[AnyRule],
    reader: TensorReader,
    *,
    model_parameters: Collection[str] | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """Fill every local parameter in place; arguments and errors are those of `plan_load`. No communication."""
    return plan_load(parameters, rules, reader, model_parameters=model_parameters).fill_all(progress)


def plan_load(
    parameters: Iterable[LocalParameter], rules: Sequence[AnyRule], reader: TensorReader, *, model_parameters: Collection[str] | None = None
) -> LoadPlan:
    """Find this rank's slices of every local parameter, and what is wrong with any of them. No communication.

    Args:
        parameters: what this rank holds (all its virtual stages). rules: of the whole model.
        model_parameters: names over all pipeline stages (`all_names` gathers them); None: the local ones are all.

    Raises:
        ConversionError: a parameter, a rule or a tensor of the checkpoint without its counterpart, a wrong shape or type, a dropped
            tensor that does not equal the one it should; all are named and nothing has been written.
        ModelError: a file cannot be read.
    """
    local = list(parameters)
    names = [parameter.name for parameter in local]
    if len(set(names)) != len(names):
        raise ConversionError("two local parameters have one name; names must be those of the whole model")
    fail_on(gaps(rules, names if model_parameters is None else model_parameters, reader.names), f"load {reader.directory}")
    tasks = _plan(local, rules_by_target(rules), reader)
    for drop in drops_of(rules):
        _check_equal(drop, tasks, reader)
    told = {drop.reason: sum(map(drop.matches, reader.names)) for drop in drops_of(rules) if drop.told}
    return LoadPlan(tasks, reader, {reason: count for reason, count in told.items() if count})


def all_names(parameters: Iterable[LocalParameter]) -> set[str]:
    """The parameter names of all ranks; the local ones where no processes are joined. Collective."""
    return gather_names(parameter.name for parameter in parameters)


def gather_names(names: Iterable[str]) -> set[str]:
    """The union of the names of all ranks; the local ones where no processes are joined. Collective."""
    own = sorted(names)
    if not dist.is_initialized():
        return set(own)
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return set().union(*gathered)


def fill(tensor: torch.Tensor, slices: Iterable[SourceSlice], reader: TensorReader, stack: Stack | None = None) -> None:
    """Write a shard from its slices, in place; without a copy where type, device and layout allow. `stack`: `Rule.stack`."""
    target = tensor.detach()
    for part in slices:
        rows = target[part.at : part.at + part.rows]
        if part.source is None:
            rows.zero_()
            continue
        if part.columns is not None:  # a shard may reach beyond the columns of its source, into zeros
            width = part.columns[1] - part.columns[0]
            rows[:, width:].zero_()
            rows = rows[:, :width]
        if stack is not None:
            rows.copy_(read_rows(reader, part.source, stack, *_spans(part)))
        elif rows.is_cpu and rows.is_contiguous() and rows.dtype == reader.dtype(part.source):
            reader.read_into(part.source, rows, *_spans(part))
        else:
            rows.copy_(reader.read(part.source, *_spans(part)))


def _spans(part: SourceSlice) -> tuple[slice, slice | None]:
    return slice(part.start, part.stop), None if part.columns is None else slice(*part.columns)


def _plan(parameters: Iterable[LocalParameter], rules: dict[str, Rule], reader: TensorReader) -> list[_Task]:
    tasks, problems = [], []
    for parameter in parameters:
        rule = rules[parameter.name]
        whole_shape = parameter.shard.whole_shape(parameter.tensor.shape)
        try:
            shapes = rule.source_shapes(whole_shape)
            slices = source_slices(rule.pieces(shapes), parameter.shard, whole_shape, rule.parts, rule.source_columns)
        except ConversionError as error:
            problems.append(str(error))
            continue
        wrong = [_mismatch(name, shape, parameter.tensor.dtype, reader) for name, shape in shapes.items()]
        problems += [text for text in wrong if text]
        tasks.append(_Task(parameter, slices, rule.stack, {reader.dtype(name) for name in shapes}))
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    fail_on(shown, f"load {reader.directory}")
    return tasks


def _mismatch(name: str, shape: tuple[int, ...], dtype: torch.dtype, reader: TensorReader) -> str:
    if reader.shape(name) != shape:
        return f"{name} has shape {reader.shape(name)}, the model wants {shape}"
    if reader.dtype(name) != dtype and not {reader.dtype(name), dtype} <= _FLOATS:
        return f"{name} is {_short(reader.dtype(name))}, which cannot become {_short(dtype)} by a plain cast"
    return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_equal(drop: Drop, tasks: Iterable[_Task], reader: TensorReader) -> None:
    """A dropped tensor against the rows of its equal that this rank holds; the ranks of a stage cover them all between them."""
    if drop.equals is None:
        return
    for name in filter(drop.matches, reader.names):
        same = reader.spec(name) == reader.spec(drop.equals)
        parts = [part for task in tasks for part in task.slices if part.source == drop.equals]
        if not same or not all(_equal_rows(name, part, reader) for part in parts):
            raise ConversionError(
                f"{reader.directory}: {name} differs from {drop.equals}, but they should be one ({drop.reason}); "
                "the config does not describe this checkpoint: mend its tie_word_embeddings, or remove the tensor"
            )


def _equal_rows(name: str, part: SourceSlice, reader: TensorReader) -> bool:
    assert part.source is not None
    _, columns = _spans(part)
    for start in range(part.start, part.stop, _COMPARE_ROWS):
        rows = slice(start, min(start + _COMPARE_ROWS, part.stop))
        ours, other = reader.read(part.source, rows, columns), reader.read(name, rows, columns)
        if not torch.equal(ours.view(torch.uint8), other.view(torch.uint8)):
            return False
    return True
