"""Shapes of rows, and faults with file, line and field."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.data.rows import BadRows, Recognised, normalise
from mswift.data.sources import RawRow
from mswift.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def raw(data: dict[str, Any]) -> RawRow:
    return RawRow(data, "a.jsonl", 7)


def fault(data: dict[str, Any], **kwargs: Any) -> str:
    with pytest.raises(DataError) as wrong:
        normalise(raw(data), **kwargs)
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


def test_messages_stay_and_other_columns_are_kept() -> None:
    data = {"messages": [USER, {**ANSWER, "reasoning_content": "r", "loss": False, "tool_calls": None}], "label": 1, "solution": "42"}
    row = normalise(raw(data))
    assert row.messages == [USER, {**ANSWER, "reasoning_content": "r", "loss": False}]
    assert row.columns == {"label": 1, "solution": "42"}
    assert row.where == "a.jsonl:7"
    assert "messages" in data  # the raw row is not changed


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, ["i", "o"]),
        ({"instruction": "i", "input": None, "output": "o"}, ["i", "o"]),
        ({"instruction": "i", "input": "x", "output": "o"}, ["i\nx", "o"]),
        ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, ["a", "b", "i", "o"]),
        ({"query": "q", "response": "r"}, ["q", "r"]),
        ({"query": "q", "response": "r", "history": []}, ["q", "r"]),
        ({"query": "q", "response": "r", "history": None}, ["q", "r"]),
    ],
)
def test_alpaca_and_query_rows(data: dict[str, Any], texts: list[str]) -> None:
    row = normalise(raw(data))
    assert [message["content"] for message in row.messages] == texts
    assert [message["role"] for message in row.messages] == ["user", "assistant"] * (len(texts) // 2)
    assert row.columns == {}


def test_a_system_column_goes_in_front_where_there_is_none() -> None:
    system = {"role": "system", "content": "s"}
    assert normalise(raw({"query": "q", "response": "r", "system": "s"})).messages[0] == system
    assert normalise(raw({"messages": [USER, ANSWER], "system": "s"})).messages == [system, USER, ANSWER]
    assert normalise(raw({"messages": [{**system, "content": "own"}, USER, ANSWER], "system": "s"})).messages[0]["content"] == "own"
    assert normalise(raw({"messages": [USER, ANSWER], "system": None})).messages == [USER, ANSWER]


def test_columns_are_renamed_before_the_shape_is_looked_at() -> None:
    row = normalise(raw({"text1": "q", "text2": "r", "id": 5}), {"text1": "query", "text2": "response", "absent": "system"})
    assert [message["content"] for message in row.messages] == ["q", "r"]
    assert row.columns == {"id": 5}
    message = fault({"text1": "q", "text2": "r"})
    assert message == "a.jsonl:7: got the columns text1, text2, wanted messages, instruction/input/output or query/response; map them with --columns"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "got the columns (none), wanted messages, instruction/input/output or query/response; map them with --columns"),
        ({"messages": "hello"}, "messages is 'hello', wanted a list of {role, content}"),
        ({"messages": []}, "messages is an empty list, wanted at least a user and an assistant turn"),
        ({"messages": [USER, "x"]}, "messages[1] is 'x', wanted an object with role and content"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content, got the keys role"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role, got the keys content"),
        ({"messages": [{"role": "owl", "content": "x"}]}, "messages[0].role is 'owl', wanted one of system, developer, user, assistant, tool"),
        ({"conversations": [{"from": "owl", "value": "x"}]}, "messages[0].from is 'owl', wanted one of system, developer, user, assistant, tool"),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "messages[0].role is a list of 1, wanted one of system, developer, user, assistant, tool",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is null, wanted a string"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}, "messages[1].content[0].text is null, wanted a string"),
        ({"messages": [USER, {**ANSWER, "loss": 2}]}, "messages[1].loss is 2, wanted true or false"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "\ud83d"}]}, "messages[1].reasoning_content holds half of a surrogate pair"),
        ({"messages": [USER]}, "no assistant turn to train on, got the roles user; add one or remove the row"),
        ({"instruction": "i"}, "response is missing, got the columns instruction"),
        ({"instruction": "i", "output": 5}, "output is 5, wanted a string"),
        ({"instruction": "i", "input": {"a": 1}, "output": "o"}, "input is an object with the keys a, wanted a string"),
        ({"query": "q"}, "response is missing, got the columns query"),
        ({"query": "q", "response": "r", "history": "x"}, "history is 'x', wanted a list of [question, answer] pairs"),
        ({"query": "q", "response": "r", "history": [["a"]]}, "history[0] is a list of 1, wanted a [question, answer] pair"),
        ({"query": "q", "response": "r", "history": [["a", None]]}, "history[0][1] is null, wanted a string"),
        ({"query": "q", "response": "r", "system": False}, "system is false, wanted a string"),
        ({"query": "q" * 50, "response": "\ud83d"}, "response holds half of a surrogate pair (a broken \\ud8.. escape), wanted whole characters; "),
        ({"query": ["x"] * 3, "response": "r"}, "query is a list of 3, wanted a string"),
    ],
)
def test_faults_name_file_line_and_field(data: dict[str, Any], message: str) -> None:
    got = fault(data)
    assert got.startswith(f"a.jsonl:7: {message}")


@pytest.mark.parametrize(
    ("data", "texts", "kept"),
    [
        ({"Question": "q", "ANSWER": "a"}, ["q", "a"], {}),
        ({"problem": "q", "solution": "a", "level": 3}, ["q", "a"], {"solution": "a", "level": 3}),
        ({"prompt": "q", "completion": "c", "answer": "a"}, ["q", "a"], {"completion": "c"}),
        ({"instruction": "i", "response": "r"}, ["i", "r"], {}),
        ({"instruction": "i", "input": "x", "answer": "a"}, ["i\nx", "a"], {}),
        ({"query": "q", "response": ["r", "s"]}, ["q", "r"], {}),
        ({"query": "q", "response": "r", "history": "[['a', 'b']]"}, ["a", "b", "q", "r"], {}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"], {}),
        ({"conversation": [{"human": "q", "assistant": "a"}, {"assistant": "b", "human": "r"}]}, ["q", "a", "r", "b"], {}),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, ["q", "a"], {}),
    ],
)
def test_columns_of_other_names_are_understood(data: dict[str, Any], texts: list[str], kept: dict[str, Any]) -> None:
    row = normalise(raw(data))
    assert [message["content"] for message in row.messages] == texts
    assert [message["role"] for message in row.messages] == ["user", "assistant"] * (len(texts) // 2)
    assert row.columns == kept


def test_names_are_only_guessed_where_they_may_be() -> None:
    assert fault({"problem": "q", "solution": "a"}, auto=False).startswith("a.jsonl:7: got the columns problem, solution, wanted messages")
    assert normalise(raw({"query": "q", "response": "r", "answer": "x"}), auto=False).columns == {"answer": "x"}
    row = normalise(raw({"Prompt": "p", "query": "x", "response": "r"}), {"prompt": "query"})
    assert [message["content"] for message in row.messages] == ["p", "r"], "what the user says wins"


def test_one_line_says_what_was_recognised() -> None:
    recognised = Recognised()
    for data in ({"problem": "q", "solution": "a", "level": 1},) * 2 + ({"messages": [USER, ANSWER], "images": ["https://x/y.png"]},):
        normalise(raw(data), recognised=recognised)
    assert recognised.line("a.jsonl") == (
        "a.jsonl: 2 rows of query/response, 1 row of messages; problem read as query, solution read as response; "
        "images kept, not shown to the model; kept: level, solution"
    )
    assert normalise(raw({"messages": [USER, ANSWER], "image": "https://x/y.png"})).media == {"images": ["https://x/y.png"]}


def test_rows_for_rewards_verdicts_and_plain_text() -> None:
    prompt = normalise(raw({"query": "q", "answer": "42", "level": 1}), want="prompt")
    assert prompt.columns == {"answer": "42", "level": 1}, "a reward function may read the answer"
    assert normalise(raw({"text": "t"}), want="text").messages == [{"role": "assistant", "content": "t"}]
    assert normalise(raw({"query": "q", "response": "r"}), want="text").messages[0] == {"role": "user", "content": "q"}
    assert fault({"text": "t"}).endswith("map them with --columns; plain text is for mswift pt")
    labels = [normalise(raw({"messages": [USER, ANSWER], "label": label}), want="label").label for label in (True, 0, "False", 1)]
    assert labels == [True, False, False, True]
    assert fault({"messages": [USER, ANSWER], "label": 5}, want="label") == "a.jsonl:7: label is 5, wanted true (the answer is wanted) or false"


def test_prompts_only_are_rows_where_no_answer_is_wanted() -> None:
    assert normalise(raw({"messages": [USER], "answer": "x"}), want="prompt").columns == {"answer": "x"}
    assert normalise(raw({"query": "q"}), want="prompt").messages == [{"role": "user", "content": "q"}]
    assert normalise(raw({"instruction": "q", "output": "o"}), want="prompt").messages[-1]["role"] == "assistant"


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["messages", "query", "response", "instruction", "output", "history", "system", "input", "tools", "images", "text", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "type", "text"]), inner),
            max_leaves=6,
        ),
    )
)
def test_any_row_is_either_normalised_or_refused_with_its_place(data: dict[str, Any]) -> None:
    try:
        messages, refusal = normalise(raw(data)).messages, ""
    except DataError as error:
        messages, refusal = [], str(error)
    assert refusal.startswith("a.jsonl:7: ") != any(message["role"] == "assistant" for message in messages)
    assert "\n" not in refusal
    assert all(isinstance(message["content"], (str, list)) for message in messages)


def test_bad_rows_are_listed_and_too_many_are_an_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("mswift"), "propagate", True)
    bad = BadRows(max_share=0.05)
    bad.finish(0)
    for i in range(5):
        bad.add(DataError(f"a.jsonl:{i}: wrong"))
    with pytest.raises(DataError) as too_many:
        bad.finish(99)
    assert str(too_many.value) == (
        "5 of 99 rows cannot be used, more than 5%: a.jsonl:0: wrong | a.jsonl:1: wrong | a.jsonl:2: wrong | and 2 more; "
        "mend them, or allow more with --max_bad_rows_ratio"
    )
    bad.finish(100)
    assert set(caplog.messages) == {
        "5 of 100 rows cannot be used and are left out: a.jsonl:0: wrong | a.jsonl:1: wrong | a.jsonl:2: wrong | and 2 more"
    }
    with pytest.raises(DataError, match=r"^a\.jsonl:9: wrong$"):
        BadRows(strict=True).add(DataError("a.jsonl:9: wrong"))
