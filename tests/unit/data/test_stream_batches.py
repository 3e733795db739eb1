"""Micro batches of a stream: the rows of a step whatever the number of ranks, faults left out in their place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mswift.data.loading import ReadSettings
from mswift.data.registry import Part
from mswift.data.shards import open_shards
from mswift.data.specs import parse_spec
from mswift.data.stream_batches import BatchShape, StreamBatches
from mswift.data.streaming import make_plan
from mswift.errors import DataError
from mswift.templates import ChatTemplate

Write = Callable[..., str]


def numbered(write_rows: Write, count: int, name: str = "a.jsonl", bad: tuple[int, ...] = ()) -> str:
    return write_rows(name, ["{" if i in bad else {"query": f"question {i}", "response": "r" * (i % 9)} for i in range(count)])


def batches_of(path: str, template: ChatTemplate, rank: int = 0, dp: int = 1, micro: int = 2, **options: Any) -> StreamBatches:
    settings = ReadSettings(**{name: options.pop(name) for name in ("strict", "max_bad_share") if name in options})
    shards = open_shards(Part(parse_spec(path)))
    plan = make_plan([[shards]], [shards.num_rows], global_batch_size=8, buffer_size=16)
    return StreamBatches(plan, template, settings, BatchShape(micro, rank, dp, pad_token_id=0), **options)


def texts(batches: list[StreamBatches], k: int, template: ChatTemplate) -> list[str]:
    """What the model sees in step `k`, over all ranks, a text a row."""
    found = []
    parts = [one.step(k) for one in batches]
    assert len({len(part) for part in parts}) == 1
    for batch in (batch for part in parts for batch in part):
        for ids, weights in zip(batch.input_ids, batch.weights, strict=True):
            if ids.any():
                found.append(template.tokenizer.decode(ids[ids != 0]))
                assert weights.any()
    return sorted(found)


def test_every_row_of_an_epoch_is_trained_once_on_any_ranks(write_rows: Write, chatml: ChatTemplate) -> None:
    path = numbered(write_rows, 51)
    alone = batches_of(path, chatml)
    assert alone.steps_per_epoch == 7
    steps = [texts([alone], k, chatml) for k in range(7)]
    wanted = sorted(chatml.render([{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "r" * (i % 9)}]) for i in range(51))
    assert sorted(text for step in steps for text in step) == wanted
    resumed = [batches_of(path, chatml, rank, 4, 1) for rank in range(4)]
    assert [texts(resumed, k, chatml) for k in range(3, 7)] == steps[3:], "on four ranks, from the fourth step on"
    assert sum(one.recognised.num_read for one in resumed) == 51 - 24
    indices = [batch.index for one in resumed for batch in one.step(0)]
    assert sorted(indices) == list(range(8))


def test_bad_and_long_rows_leave_their_place_empty(write_rows: Write, chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered(write_rows, 16, bad=(5,))
    stream = batches_of(path, chatml, max_bad_share=0.1, max_length=len(chatml.encode_prompt([{"role": "user", "content": "question 10"}])) + 8)
    rows = [text for k in range(2) for text in texts([stream], k, chatml)]
    assert stream.report.num_dropped > 0
    assert len(rows) == 15 - stream.report.num_dropped
    assert [str(error).split(": ")[0] for error in stream.bad.errors] == [f"{path}:6"]
    stream.finish()
    strict = batches_of(path, chatml, strict=True)
    with pytest.raises(DataError, match=r"a\.jsonl:6: not JSON"):
        [strict.step(k) for k in range(2)]
    careless = batches_of(path, chatml)
    assert [len(careless.step(k)) for k in range(2)] == [4, 4]
    with pytest.raises(DataError, match=r"^1 of 16 rows cannot be used, more than 1%: "):
        careless.finish()


def test_too_many_bad_rows_stop_a_run_on_its_way(write_rows: Write, chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("mswift"), "propagate", True)
    monkeypatch.setattr("mswift.data.stream_batches._TRUSTED_AFTER", 20)
    stream = batches_of(numbered(write_rows, 64, bad=tuple(range(0, 64, 2))), chatml)
    stream.step(0)
    with pytest.raises(DataError, match=r"^\d+ of \d+ rows cannot be used, more than 1%: .*not JSON"):
        [stream.step(k) for k in range(1, 8)]


def test_a_step_without_any_row_is_a_filler(tmp_path: Path, write_rows: Write, chatml: ChatTemplate) -> None:
    stream = batches_of(numbered(write_rows, 8, bad=tuple(range(8))), chatml, max_bad_share=1.0)
    batches = stream.step(0)
    assert len(batches) == 4
    assert all(batch.num_tokens == 0 and not batch.weights.any() for batch in batches)
    assert batches[0].input_ids.shape == (1, 1)
