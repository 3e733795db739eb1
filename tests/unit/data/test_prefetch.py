"""Steps made ahead by a thread: the same as without it, waits that are measured, errors that arrive."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from mswift.data.batches import Batches, MicroBatch
from mswift.data.encoded import EncodedDataset
from mswift.data.prefetch import Prefetcher
from mswift.data.report import LengthReport
from mswift.data.rows import Row


class Slow(Batches):
    """Takes a while for each step, counts the steps made, and fails at one of them."""

    delay_s = 0.0
    fails_at = -1
    made = 0

    def step(self, k: int) -> list[MicroBatch]:
        if k == self.fails_at:
            raise ArithmeticError(f"step {k}")
        time.sleep(self.delay_s)
        self.made += 1
        return super().step(k)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mswift-prefetch"]


@pytest.fixture
def batches() -> Slow:
    encoded = [(np.arange(1, n + 1, dtype=np.int32), np.ones(n, np.float32)) for n in (3, 4, 5, 6, 7)]
    dataset = EncodedDataset(encoded, [Row([], {}, "a", i) for i in range(5)], LengthReport(None, "delete"))
    return Slow(dataset, micro_batch_size=1, global_batch_size=2)


def test_steps_come_in_order_and_are_those_of_the_batches(batches: Slow) -> None:
    with Prefetcher(batches, 4, stop=9) as steps:
        made = list(steps)
        assert list(steps) == []
    assert [k for k, _ in made] == [4, 5, 6, 7, 8]
    assert [[batch.rows for batch in step] for _, step in made] == [batches.rows_of(k) for k in range(4, 9)]
    assert not prefetch_threads()


def test_without_a_stop_it_stays_only_so_far_ahead(batches: Slow) -> None:
    with Prefetcher(batches, depth=2) as steps:
        assert [k for k, _ in itertools.islice(steps, 10)] == list(range(10))
        time.sleep(0.1)
        assert 10 <= batches.made <= 13
        steps.close()
        steps.close()
        assert list(steps) == []
    assert not prefetch_threads()


def test_waiting_is_measured(batches: Slow) -> None:
    batches.delay_s = 0.05
    with Prefetcher(batches, stop=3) as steps:
        next(steps)
        first = steps.wait_s
        assert first == steps.last_wait_s > 0.03
        time.sleep(0.4)
        next(steps)
        assert steps.last_wait_s < 0.03
        assert steps.wait_s == pytest.approx(first + steps.last_wait_s)


def test_an_error_in_the_thread_arrives_at_its_step(batches: Slow) -> None:
    batches.fails_at = 2
    with Prefetcher(batches) as steps:
        assert [k for k, _ in itertools.islice(steps, 2)] == [0, 1]
        with pytest.raises(ArithmeticError, match="step 2"):
            next(steps)
        assert list(steps) == []
