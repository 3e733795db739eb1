"""Sources read one after the other: what is said of them, what is left out, what is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from mswift.data.loading import ReadSettings, load_sources
from mswift.errors import DataError

Write = Callable[..., str]
GOOD = {"query": "q", "response": "r"}


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("mswift"), "propagate", True)


def test_each_source_is_said_in_one_line(write_rows: Write, caplog: pytest.LogCaptureFixture) -> None:
    first = write_rows("a.jsonl", [GOOD] * 200 + ["{", {"query": "q"}])
    second = write_rows("b.jsonl", [{"problem": "p", "solution": "s"}])
    loaded = load_sources([f"{first}#5", f"{second}@2"], ReadSettings(max_bad_share=0.02))
    assert [(source.spec.count, source.spec.weight, len(source.rows), source.num_read) for source in loaded] == [
        (5, None, 200, 202),
        (None, 2.0, 1, 1),
    ]
    assert [source.line for source in loaded] == [
        f"{first}: 200 rows of query/response; 2 left out",
        f"{second}: 1 row of query/response; problem read as query, solution read as response; kept: solution",
    ]
    assert caplog.messages[0].startswith(f"2 of 203 rows cannot be used and are left out: {first}:201: not JSON: ")


def test_lines_that_are_no_rows_are_counted_as_bad_rows(write_rows: Write) -> None:
    path = write_rows("a.jsonl", [GOOD] * 10 + ['{"query": '])
    with pytest.raises(
        DataError, match=r"^1 of 11 rows cannot be used, more than 1%: .*a\.jsonl:11: not JSON: .*; mend them, or allow more with --max"
    ):
        load_sources([path], ReadSettings())
    with pytest.raises(DataError, match=r"a\.jsonl:11: not JSON"):
        load_sources([path], ReadSettings(strict=True, max_bad_share=1))
    assert len(load_sources([path], ReadSettings(max_bad_share=0.1))[0].rows) == 10


def test_a_column_that_a_source_lacks(write_rows: Write, caplog: pytest.LogCaptureFixture) -> None:
    first, second = write_rows("a.jsonl", [{"text1": "q", "response": "r"}]), write_rows("b.jsonl", [GOOD])
    assert len(load_sources([first, second], ReadSettings({"text1": "query"}))) == 2
    assert f"{second}: has no column 'text1' of --columns" in caplog.messages
    with pytest.raises(DataError, match=r"^--columns: no source has the column 'text2'; check its name$"):
        load_sources([first, second], ReadSettings({"text1": "query", "text2": "system"}))
    third = write_rows("c.jsonl", [{"query": "q"}])
    with pytest.raises(DataError, match=r"^1 of 1 rows cannot be used, more than 1%: .*c\.jsonl:1: response is missing, got the columns query"):
        load_sources([first, third], ReadSettings({"text1": "query"}))
