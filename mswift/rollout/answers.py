"""Answers to the rows of a file, written to another as they come: in order, whole lines, from all data-parallel replicas."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mswift.errors import DataError
from mswift.rollout.generate import Answer, Generator
from mswift.rollout.prompts import Question
from mswift.rollout.settings import GenerationSettings
from mswift.templates import Tool
from mswift.templates.tool_calls import Parsed

Answers: TypeAlias = dict[int, Answer]
Parse: TypeAlias = Callable[[Sequence[int], Sequence[Tool]], Parsed]
Gather: TypeAlias = Callable[[Answers], list[Answers] | None]

_BATCHES_OF_A_WINDOW = 16


class ResultFile:
    """A new JSON lines file in which lines appear whole, in order, whatever order they are given in.

    Raises:
        DataError: the file exists, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_lines, self._size = path, 0, 0
        self._waiting: dict[int, bytes] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}; give another --result_path") from error

    def put(self, index: int, record: dict[str, Any]) -> None:
        """Line number `index`, from 0; it is written as soon as all before it are."""
        self._waiting[index] = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        while self.num_lines in self._waiting:
            self._append(self._waiting.pop(self.num_lines))
            self.num_lines += 1

    def _append(self, line: bytes) -> None:
        at = 0
        try:
            while at < len(line):
                at += os.write(self._file, line[at:])
        except OSError as error:
            os.ftruncate(self._file, self._size)  # no half line stays
            raise DataError(f"{self.path}: {error.strerror or error} after {self.num_lines} whole lines, which stay") from error
        self._size += len(line)

    def close(self) -> None:
        """No line follows; a file without lines is removed."""
        os.close(self._file)
        if not self.num_lines:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Replica:
    """Which share of the rows this process answers.

    Args:
        index, count: data-parallel rank and size. gather: brings the answers of all replicas to the process that writes; None elsewhere.
    """

    index: int = 0
    count: int = 1
    gather: Gather = lambda answers: [answers]


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was generated over all replicas, on the process that writes."""

    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / max(self.seconds, 1e-9)


def answer_rows(
    generator: Generator,
    questions: Sequence[Question],
    settings: GenerationSettings,
    result: ResultFile | None,
    *,
    batch_size: int = 1,
    seed: int | None = None,
    prefix: str = "",
    parse: Parse | None = None,
    replica: Replica | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Throughput:
    """Answer all questions and write a line for each, in their order.

    Windows of rows are sorted by length into batches of prompts that are answered together; a line is written when those before it are, which
    with several replicas is at the end of a window.

    Args:
        result: None on processes that do not write. seed: row number n is drawn with seed + n, whatever the batches and replicas are.
        prefix: text that every answer begins with. parse: finds the tool calls in the answers to rows with tools.
        progress: called with (rows done, all rows).
    """
    replica = replica or Replica()
    started, num_tokens, written = time.perf_counter(), 0, 0
    for window in _windows(len(questions), batch_size * _BATCHES_OF_A_WINDOW * replica.count):
        mine: Answers = {}
        for batch in _batches(window[replica.index :: replica.count], questions, batch_size):
            for index, answer in _answer_batch(generator, batch, questions, settings, seed):
                mine[index] = answer
                if result is not None and replica.count == 1:
                    result.put(index, _record(questions[index], answer, prefix, parse))
                progress(min(written + len(mine) * replica.count, len(questions)), len(questions))
        for answers in replica.gather(mine) or ():
            num_tokens += sum(len(answer.token_ids) for answer in answers.values())
            if result is not None and replica.count > 1:
                for index, answer in answers.items():
                    result.put(index, _record(questions[index], answer, prefix, parse))
        written += len(window)
    return Throughput(num_tokens, time.perf_counter() - started)


def _windows(total: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, total)) for first in range(0, total, size))


def _batches(indices: Sequence[int], questions: Sequence[Question], batch_size: int) -> Iterator[list[int]]:
    """Rows of like length together, so that little is padded; in the order of the rows where each is answered alone."""
    ordered = sorted(indices, key=lambda index: len(questions[index].prompt)) if batch_size > 1 else list(indices)
    return (ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size))


def _answer_batch(
    generator: Generator, batch: Sequence[int], questions: Sequence[Question], settings: GenerationSettings, seed: int | None
) -> Iterator[tuple[int, Answer]]:
    seeds = None if seed is None else [seed + index for index in batch]
    for pieces in generator.stream([questions[index].prompt for index in batch], settings, seeds=seeds):
        yield from ((batch[piece.row], piece.answer) for piece in pieces if piece.answer is not None)


def _record(question: Question, answer: Answer, prefix: str, parse: Parse | None) -> dict[str, Any]:
    response = prefix + answer.text
    message: dict[str, Any] = {"role": "assistant", "content": response}
    parsed = parse(answer.token_ids, question.tools) if parse is not None and question.tools else None
    if parsed is not None and parsed.tool_calls:
        message |= {"content": parsed.content, "tool_calls": list(parsed.tool_calls)}
    return {
        **question.columns,
        **({"tools": list(question.tools)} if question.tools else {}),
        "messages": [*question.messages, message],
        "response": response,
        "labels": question.label,
        "finish_reason": answer.finish_reason,
    }
