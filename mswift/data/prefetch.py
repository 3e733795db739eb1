"""Makes the micro batches of the next steps in a thread while the current step runs, and measures how long the step had to wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from mswift.data.batches import MicroBatch, StepSource


class Prefetcher:
    """Iterates over ``(k, micro batches of step k)`` from step ``start``, made up to ``depth`` steps ahead by one thread.

    Args:
        stop: the first step that is not made; ``None`` goes on without end.

    Attributes:
        wait_s: seconds that the consumer has waited for data so far. last_wait_s: those of the last step.

    An exception in the thread is raised in the consumer, at the step that it belongs to. `close` ends the thread; leaving a ``with`` does too.
    """

    def __init__(self, batches: StepSource, start: int = 0, *, stop: int | None = None, depth: int = 2) -> None:
        self._batches, self._stop = batches, stop
        self._ready: queue.Queue[tuple[int, list[MicroBatch]] | Exception | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._ended = False
        self.wait_s = self.last_wait_s = 0.0
        self._thread = threading.Thread(target=self._work, args=(start,), name="mswift-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        return self

    def __next__(self) -> tuple[int, list[MicroBatch]]:
        if self._ended or self._closed.is_set():
            raise StopIteration
        begin = time.perf_counter()
        item = self._ready.get()
        self.last_wait_s = time.perf_counter() - begin
        self.wait_s += self.last_wait_s
        if isinstance(item, tuple):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _work(self, k: int) -> None:
        try:
            while not self._closed.is_set() and (self._stop is None or k < self._stop):
                self._put((k, self._batches.step(k)))
                k += 1
            self._put(None)
        except Exception as error:  # raised again in the consumer
            self._put(error)

    def _put(self, item: tuple[int, list[MicroBatch]] | Exception | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return
            except queue.Full:
                continue
