"""Processes that read and tokenise the rows of a stream for one rank, each those of its own lanes."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection

from mswift.data.registry import Part, load_infos, load_plugins, resolve
from mswift.data.stream_reader import StepRows, StreamReader
from mswift.errors import DataError


@dataclass(frozen=True, slots=True)
class Origin:
    """What was registered, so that another process can do it again: functions of a user's file cannot be sent to it.

    Args:
        datasets: entries of ``--dataset``. plugins, infos: files. use_hf: as for `resolve`.
    """

    datasets: list[str]
    plugins: list[str]
    infos: list[str]
    use_hf: bool | None = None

    def parts(self) -> list[list[Part]]:
        """Those of each entry, with the functions that make their rows."""
        load_plugins(self.plugins)
        load_infos(self.infos)
        return [resolve(text, use_hf=self.use_hf)[1] for text in self.datasets]


class Workers:
    """`count` processes that each read a share of every step from `start` on, as far ahead as a pipe holds.

    Args:
        reader: of all rows of the rank. origin: None where no function of a user makes rows.
    """

    def __init__(self, reader: StreamReader, count: int, start: int, origin: Origin | None = None) -> None:
        context, sent = get_context("spawn"), _sent(reader, origin)
        self._pipes: list[Connection] = []
        self._processes = []
        for worker in range(count):
            mine, other = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(other, sent, worker, count, start), name=f"mswift-read-{worker}", daemon=True)
            process.start()
            other.close()  # so that its end is noticed
            self._pipes.append(mine)
            self._processes.append(process)

    def steps(self) -> Iterator[list[StepRows]]:
        """What all of them made of one step after the other.

        Raises:
            DataError: one of them has ended.
        """
        while True:
            yield [self._receive(worker) for worker in range(len(self._pipes))]

    def close(self) -> None:
        """Ends them."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()

    def _receive(self, worker: int) -> StepRows:
        try:
            made: StepRows = self._pipes[worker].recv()
        except EOFError as error:
            self._processes[worker].join()
            code = self._processes[worker].exitcode
            raise DataError(
                f"process {worker} of --dataloader_num_workers {len(self._pipes)} has ended (exit code {code}); if memory ran out take fewer"
            ) from error
        return made


def _sent(reader: StreamReader, origin: Origin | None) -> bytes:
    """The reader without what cannot be sent, and where to find that."""
    if origin is not None:
        for source in reader.plan.sources:
            source.shards = [replace(one, part=replace(one.part, preprocess=None)) for one in source.shards]
    return pickle.dumps((origin, reader))


def _work(pipe: Connection, sent: bytes, worker: int, workers: int, start: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank that gets it too ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    origin, reader = pickle.loads(sent)
    if origin is not None:
        for source, parts in zip(reader.plan.sources, origin.parts(), strict=True):
            found = zip(source.shards, parts, strict=True)
            source.shards = [replace(one, part=replace(one.part, preprocess=part.preprocess)) for one, part in found]
    reader.share = replace(reader.share, worker=worker, workers=workers)
    try:
        for step in reader.steps(start):
            pipe.send(step)
    except BrokenPipeError:  # nobody reads any more
        return
