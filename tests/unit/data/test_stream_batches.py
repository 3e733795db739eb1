"""Micro batches of a stream: the rows of a step whatever the number of ranks, faults left out in their place."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mswift.data.loading import ReadSettings
from mswift.data.registry import Part, forget_all
from mswift.data.shards import open_shards
from mswift.data.specs import parse_spec
from mswift.data.stream_batches import BatchShape, StreamBatches
from mswift.data.stream_workers import Origin
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
    assert sum(one.num_read for one in resumed) == 51 - 24
    indices = [batch.index for one in resumed for batch in one.step(0)]
    assert sorted(indices) == list(range(8))


def seen(batches: StreamBatches, steps: range) -> list[list[dict[str, Any]]]:
    """Everything of the micro batches of some steps, to be compared."""
    found = [
        [{"ids": one.input_ids.tolist(), "weights": one.weights.tolist(), "rows": one.rows, "index": one.index} for one in batches.step(k)]
        for k in steps
    ]
    batches.close()
    return found


def test_processes_that_read_for_a_rank_change_nothing(write_rows: Write, chatml: ChatTemplate) -> None:
    path = numbered(write_rows, 51, bad=(7, 30))
    longest = len(chatml.encode_prompt([{"role": "user", "content": "question 10"}])) + 8
    options = {"max_bad_share": 0.1, "max_length": longest}
    for dp, workers in ((1, 3), (2, 1)):
        for rank in range(dp):
            alone, helped = (batches_of(path, chatml, rank, dp, workers=number, **options) for number in (0, workers))
            assert seen(helped, range(7)) == seen(alone, range(7))
            assert helped.num_read == alone.num_read > 20
            assert helped.report.lines() == alone.report.lines()
            assert "too long" in helped.report.lines()[0]
            assert sorted(helped.bad.errors) == sorted(alone.bad.errors)
    assert seen(batches_of(path, chatml, workers=2, **options), range(4, 9)) == seen(batches_of(path, chatml, **options), range(4, 9)), "resumed"


def test_a_reading_process_knows_what_a_plugin_registers_and_its_end_is_one_line(write_rows: Write, chatml: ChatTemplate, tmp_path: Path) -> None:
    path = write_rows("a.jsonl", [{"q": f"question {i}"} for i in range(24)])
    plugin = tmp_path / "plugin.py"
    register = f"register_dataset('mine', path={path!r}, preprocess=lambda row: {{'query': row['q'], 'response': 'made'}})"
    plugin.write_text(f"from mswift.data import register_dataset\n{register}\n")
    origin = Origin(["mine"], [str(plugin)], [])
    (part,) = origin.parts()[0]
    shards = open_shards(part)
    plan = make_plan([[shards]], [24], global_batch_size=8)
    stream = StreamBatches(plan, chatml, ReadSettings(), BatchShape(2), workers=1, origin=origin)
    assert sum("made" in text for text in texts([stream], 0, chatml)) == 8
    (child,) = [one for one in multiprocessing.active_children() if one.name.startswith("mswift-read-")]
    os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match=r"^process 0 of --dataloader_num_workers 1 has ended \(exit code -9\); if memory ran out take fewer$"):
        [stream.step(k) for k in range(1, 20)]
    stream.close()
    forget_all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_cut_is_an_error_at_its_step_and_not_before(write_rows: Write, chatml: ChatTemplate, workers: int) -> None:
    path = Path(numbered(write_rows, 24))
    shards = open_shards(Part(parse_spec(str(path))))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:18]))
    plan = make_plan([[shards]], [24], global_batch_size=8, buffer_size=8, shuffle=False)
    stream = StreamBatches(plan, chatml, ReadSettings(), BatchShape(8), workers=workers)
    for k in range(2):
        assert stream.step(k)[0].rows == list(range(8))
        assert stream.num_read == 8 * k + 8, "what is read ahead counts when it is its turn"
    with pytest.raises(DataError, match="has fewer rows than when the run began; leave data alone while it is read"):
        stream.step(2)
    stream.close()


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
