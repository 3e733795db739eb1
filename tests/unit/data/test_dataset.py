"""Loading, sampling, splitting, encoding and the report of what did not fit."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mswift.data import Row, encode_dataset, load_dataset, split
from mswift.errors import DataError
from mswift.templates import ChatTemplate

Write = Callable[..., str]
MORE = "mend them, or allow more with --max_bad_rows_ratio"


def rows_of(*answers: str, source: str = "a.jsonl") -> list[Row]:
    pairs = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in answers]
    return [Row(messages, {}, source, line) for line, messages in enumerate(pairs, start=1)]


def numbered(write_rows: Write, count: int, name: str = "a.jsonl") -> str:
    return write_rows(name, [{"query": str(i), "response": f"r{i}"} for i in range(count)])


def queries(rows: list[Row]) -> list[int]:
    return [int(row.messages[0]["content"]) for row in rows]


# ---- loading


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 5))
def test_a_count_takes_whole_passes_and_a_sample_for_the_rest(write_rows: Write, length: int, count: int, seed: int) -> None:
    path = numbered(write_rows, length)
    taken = queries(load_dataset([f"{path}#{count}"], seed=seed))
    assert len(taken) == count
    assert set(Counter(taken).values()) <= {count // length, count // length + 1}
    assert taken == queries(load_dataset([f"{path}#{count}"], seed=seed))
    assert queries(load_dataset([f"{path}#{count}"], shuffle=False)) == [i % length for i in range(count)]


def test_a_sample_follows_the_seed_and_the_position(write_rows: Write) -> None:
    path = numbered(write_rows, 50)
    first, other = (queries(load_dataset([f"{path}#10"], seed=seed)) for seed in (1, 2))
    assert set(first) != set(other)
    assert first != sorted(first)
    twice = queries(load_dataset([f"{path}#10", f"{path}#10"], seed=1))
    assert twice[:10] == first
    assert twice[10:] != first


def test_sources_come_one_after_the_other_with_their_places(write_rows: Write) -> None:
    a, b = numbered(write_rows, 2), numbered(write_rows, 3, "b.jsonl")
    rows = load_dataset([b, a])
    assert queries(rows) == [0, 1, 2, 0, 1]
    assert [row.where for row in rows] == [f"{b}:1", f"{b}:2", f"{b}:3", f"{a}:1", f"{a}:2"]


def test_bad_rows_stop_are_too_many_or_are_left_out(write_rows: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("mswift"), "propagate", True)
    good = [{"query": "0", "response": "r"}] * 99
    path = write_rows("a.jsonl", [*good, {"messages": [{"role": "user", "content": "x"}]}])
    fault = f"{path}:100: no assistant turn to train on, got the roles user; add one or remove the row"
    assert len(load_dataset([path])) == 99
    assert set(caplog.messages) == {f"1 of 100 rows cannot be used and are left out: {fault}"}
    for kwargs, message in ({"strict": True}, fault), ({"max_bad_share": 0.0}, f"1 of 100 rows cannot be used, more than 0%: {fault}; {MORE}"):
        with pytest.raises(DataError) as stopped:
            load_dataset([path], **kwargs)  # type: ignore[arg-type]
        assert str(stopped.value) == message
    assert len(load_dataset([path], want="prompt")) == 100


def test_nothing_to_load(write_rows: Write) -> None:
    with pytest.raises(DataError, match=r"^no data: wanted at least one --dataset, such as --dataset data/train\.jsonl$"):
        load_dataset([])
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows; check --dataset$"):
        load_dataset([write_rows("empty.jsonl", ["", " "])])
    with pytest.raises(DataError, match=r"none of its 1 rows can be used$"):
        load_dataset([write_rows("bad.jsonl", [{"query": "x"}])], max_bad_share=1.0)


@settings(deadline=None)
@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 3))
def test_a_split_loses_and_repeats_nothing(count: int, ratio: float, seed: int) -> None:
    rows = rows_of(*map(str, range(count)))
    train, val = split(rows, ratio, seed)
    assert sorted(row.line for row in train + val) == [row.line for row in rows]
    assert len(val) == min(max(round(count * ratio), 1), count - 1)
    assert all(part == sorted(part, key=lambda row: row.line) for part in (train, val))
    assert split(rows, ratio, seed) == (train, val)


def test_a_split_of_nothing_and_wrong_ratios() -> None:
    rows = rows_of("a")
    assert split(rows, 0.0) == (rows, [])
    with pytest.raises(DataError, match=r"there is 1 row, wanted at least 2; give a --val_dataset or set the ratio to 0$"):
        split(rows, 0.5)
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match=r"wanted at least 0 and less than 1$"):
            split(rows, ratio)


# ---- encoding


def test_encoded_rows_are_those_of_the_template(chatml: ChatTemplate) -> None:
    rows = rows_of("Paris", "", "é" * 30)
    calls: list[tuple[int, int]] = []
    encoded = encode_dataset(rows, chatml, progress=lambda done, total: calls.append((done, total)))
    expected = [chatml.encode(row.messages) for row in rows]
    assert list(encoded) == expected
    assert encoded.lengths.tolist() == [len(row) for row in expected]
    assert encoded.num_tokens == sum(len(row) for row in expected)
    assert [encoded.where(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert calls == [(3, 3)]
    ids, weights = encoded.arrays(2)
    assert (ids.dtype, weights.dtype, encoded.lengths.dtype) == (np.int32, np.float32, np.int64)
    assert encoded.report.lines() == ["a.jsonl: 3 rows kept"]
    with pytest.raises(IndexError, match="row 3 of 3"):
        encoded[3]


def test_long_rows_are_dropped_with_their_places(chatml: ChatTemplate, tmp_path: Path) -> None:
    rows = rows_of("a", "b" * 90, "c") + rows_of("d" * 80, "e", source="b.jsonl")
    report_dir = tmp_path / "new"
    encoded = encode_dataset(rows, chatml, max_length=40, report_dir=report_dir)
    assert [encoded.where(i) for i in range(len(encoded))] == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:2"]
    lengths = [len(chatml.encode(rows[i].messages)) for i in (1, 3)]
    assert (report_dir / "dropped_rows.txt").read_text() == (
        f"a.jsonl:2\ttoo long: {lengths[0]} tokens, max_length 40\nb.jsonl:1\ttoo long: {lengths[1]} tokens, max_length 40\n"
    )
    report = encoded.report
    assert report.lines() == ["a.jsonl: 2 rows kept, 1 dropped (1 too long)", "b.jsonl: 1 rows kept, 1 dropped (1 too long)"]
    assert (report.num_kept, report.num_dropped, report.num_truncated, report.longest) == (3, 2, 0, max(lengths))


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_long_rows_are_cut(chatml: ChatTemplate, tmp_path: Path, truncation: Any) -> None:
    rows = rows_of("a", "b" * 90)
    whole = chatml.encode(rows[1].messages)
    encoded = encode_dataset(rows, chatml, max_length=40, truncation=truncation, report_dir=tmp_path)
    kept = slice(40) if truncation == "right" else slice(-40, None)
    assert encoded[1].input_ids == whole.input_ids[kept]
    assert encoded[1].weights == whole.weights[kept]
    assert encoded.report.lines() == [f"a.jsonl: 2 rows kept (1 cut {truncation})"]
    assert not (tmp_path / "dropped_rows.txt").exists()


def test_long_rows_are_cut_into_several(chatml: ChatTemplate, tmp_path: Path) -> None:
    rows = rows_of("a", "b" * 90)
    rows[1].messages[0]["content"] = "long " * 30
    whole = chatml.encode(rows[1].messages)
    encoded = encode_dataset(rows, chatml, max_length=20, truncation="split", report_dir=tmp_path)
    pieces = [slice(start, start + 20) for start in range(0, len(whole), 20)]
    trained = [piece for piece in pieces if any(whole.weights[piece][1:])]
    assert 0 < len(trained) < len(pieces), "the question is longer than a piece"
    assert [row.input_ids for row in encoded][1:] == [whole.input_ids[piece] for piece in trained]
    assert [row.weights for row in encoded][1:] == [whole.weights[piece] for piece in trained]
    assert [encoded.where(i) for i in range(len(encoded))] == ["a.jsonl:1", *["a.jsonl:2"] * len(trained)]
    lost = len(pieces) - len(trained)
    assert encoded.report.lines() == [f"a.jsonl: {1 + len(trained)} rows kept (1 cut into {len(trained)}), {lost} pieces left out (nothing to train)"]
    reason = f"{lost} of {len(pieces)} pieces left out: cut from {len(whole)} tokens, they have no token with a weight"
    assert (tmp_path / "dropped_rows.txt").read_text() == f"a.jsonl:2\t{reason}\n"
    assert encoded.report.num_dropped == 0
    with pytest.raises(DataError, match=r"2 dropped \(2 with nothing to train\)"):
        encode_dataset(rows, chatml, max_length=1, truncation="split")


def test_a_cut_row_with_nothing_to_train_is_dropped(chatml: ChatTemplate, tmp_path: Path) -> None:
    rows = rows_of("a", "b")
    rows[1].messages[0]["content"] = "long " * 40
    encoded = encode_dataset(rows, chatml, max_length=20, truncation="right", report_dir=tmp_path)
    length = len(chatml.encode(rows[1].messages))
    assert len(encoded) == 1
    assert (tmp_path / "dropped_rows.txt").read_text() == (
        f"a.jsonl:2\tnothing to train: cut right from {length} to 20 tokens, it has no token with a weight\n"
    )
    assert encoded.report.lines() == ["a.jsonl: 1 rows kept, 1 dropped (1 with nothing to train)"]


def test_all_rows_too_long_is_one_line_with_counts_and_the_file(chatml: ChatTemplate, tmp_path: Path) -> None:
    rows = rows_of("a", "b" * 50)
    short, long = (len(chatml.encode(row.messages)) for row in rows)
    with pytest.raises(DataError) as nothing:
        encode_dataset(rows, chatml, max_length=5, report_dir=tmp_path)
    path = tmp_path / "dropped_rows.txt"
    assert str(nothing.value) == (
        f"all 2 rows exceed max_length 5 (shortest {short}, longest {long} tokens); raise --max_length to at least {short}, "
        f"or cut with --truncation_strategy right or left; the row numbers are in {path}"
    )
    assert [line.split("\t")[0] for line in path.read_text().splitlines()] == ["a.jsonl:1", "a.jsonl:2"]
    with pytest.raises(
        DataError, match=r"^no row is left to train on: a\.jsonl: 0 rows kept, 2 dropped \(2 with nothing to train\); raise --max_length"
    ):
        encode_dataset(rows, chatml, max_length=5, truncation="right")
    with pytest.raises(DataError, match=r"^there are no rows to encode; check --dataset$"):
        encode_dataset([], chatml)


def test_rows_that_the_template_refuses_are_counted(chatml: ChatTemplate, tmp_path: Path) -> None:
    rows = rows_of(*"abc")
    del rows[1].messages[0]
    fault = "a.jsonl:2: messages[0] is an assistant turn: nothing would be served before it; drop it or put a user turn in front"
    with pytest.raises(DataError) as too_many:
        encode_dataset(rows, chatml, report_dir=tmp_path)
    assert str(too_many.value) == f"1 of 3 rows cannot be used, more than 1%: {fault}; {MORE}"
    with pytest.raises(DataError) as strict:
        encode_dataset(rows, chatml, strict=True)
    assert str(strict.value) == fault
    encoded = encode_dataset(rows, chatml, max_bad_share=0.5, report_dir=tmp_path)
    assert encoded.report.lines() == ["a.jsonl: 2 rows kept, 1 dropped (1 refused by the template)"]
    assert (tmp_path / "dropped_rows.txt").read_text() == fault.replace(": messages", "\tmessages") + "\n"


def test_worker_processes_give_the_same(chatml: ChatTemplate) -> None:
    rows = rows_of(*(f"answer {i}" for i in range(2300)))
    rows[1300].messages.clear()
    alone = encode_dataset(rows, chatml)
    spread = encode_dataset(rows, chatml, num_proc=2)
    assert list(spread) == list(alone)
    assert spread.report == alone.report
    assert len(spread) == 2299


def test_the_collector_leaves_rows_alone_while_they_are_encoded_and_not_after(chatml: ChatTemplate) -> None:
    frozen: list[int] = []
    rows = [Row([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], {}, "a.jsonl", i) for i in range(1100)]
    encode_dataset(rows, chatml, progress=lambda done, total: frozen.append(gc.get_freeze_count()))
    assert len(frozen) == 2
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0
    with pytest.raises(DataError):
        encode_dataset([Row([{"role": "user", "content": "q"}], {}, "a.jsonl", 1)], chatml)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        encode_dataset(rows[:2], chatml)
        assert gc.get_freeze_count() > 0, "what somebody else has frozen stays so"
    finally:
        gc.unfreeze()
