"""Every way to write two answers to one question."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mswift.data.rows import Recognised, normalise
from mswift.data.sources import RawRow
from mswift.errors import DataError

USER = {"role": "user", "content": "q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "query/response, chosen/rejected"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "query/response, chosen/rejected"),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "query/response, chosen/rejected"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "chosen/rejected"),
        ({"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}, "chosen/rejected"),
        ({"messages": [USER], "chosen": "good", "rejected": "bad"}, "messages, chosen/rejected"),
        ({"messages": [USER, GOOD], "rejected_response": "bad"}, "messages, rejected_response"),
        ({"messages": [USER, GOOD], "rejected_response": [BAD]}, "messages, rejected_response"),
        ({"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, "messages, rejected_messages"),
        ({"query": "q", "response": "good", "rejected_response": "bad"}, "query/response, rejected_response"),
        ({"instruction": "q", "input": "", "output": "good", "rejected": "bad"}, "alpaca, rejected_response"),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            "ShareGPT, chosen/rejected",
        ),
    ],
)
def test_shapes_of_pairs(data: dict[str, Any], shape: str) -> None:
    recognised = Recognised()
    row = normalise(RawRow({**data, "margin": 2}, "a", 1), want="preference", recognised=recognised)
    assert row.messages == [USER, GOOD]
    assert row.rejected == [USER, BAD]
    assert row.columns == {"margin": 2}
    assert list(recognised.shapes) == [shape]


def test_system_and_history_are_shared() -> None:
    row = normalise(RawRow({"system": "s", "history": [["a", "b"]], "query": "q", "response": "good", "rejected": "bad"}, "a", 1), want="preference")
    assert [message["content"] for message in row.messages] == ["s", "a", "b", "q", "good"]
    assert row.rejected is not None
    assert [message["content"] for message in row.rejected] == ["s", "a", "b", "q", "bad"]
    row = normalise(RawRow({"system": "s", "messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, "a", 1), want="preference")
    assert row.rejected == [{"role": "system", "content": "s"}, USER, BAD]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"messages": [USER, GOOD]}, "the rejected answer is missing, wanted rejected, rejected_response or rejected_messages"),
        ({"messages": [USER], "rejected": "bad"}, "chosen is missing, and the conversation ends with a user turn, wanted the better answer; give it"),
        ({"messages": [USER, GOOD], "rejected_response": "good"}, "the chosen and the rejected answer are equal, wanted two different ones"),
        ({"prompt": "q", "chosen": "good", "rejected": 5}, "rejected is 5, wanted a string"),
        ({"prompt": "q", "chosen": [USER], "rejected": [BAD]}, "chosen ends with a user turn, wanted an assistant turn"),
        ({"chosen": "good", "rejected": "bad"}, "got the columns (none), wanted messages, "),
    ],
)
def test_faults_of_pairs(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as wrong:
        normalise(RawRow(data, "a.jsonl", 3), want="preference")
    assert str(wrong.value).startswith(f"a.jsonl:3: {message}")
