"""Dialects of conversations and tools, and the one form that comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mswift.data.messages import MessageNames, read_messages, read_tools
from mswift.data.rows import Row, normalise
from mswift.data.sources import RawRow
from mswift.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RAW = RawRow({}, "a.jsonl", 3)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def whole(messages: list[Any], tools: Any = (TOOL,)) -> Row:
    return normalise(RawRow({"messages": messages, "tools": list(tools) if isinstance(tools, tuple) else tools}, "a.jsonl", 3))


def fault(messages: list[Any], tools: Any = (TOOL,)) -> str:
    with pytest.raises(DataError) as wrong:
        whole(messages, tools)
    assert "\n" not in str(wrong.value)
    return str(wrong.value).removeprefix("a.jsonl:3: ")


DIALECTS = {
    "openai": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "cold"}, ANSWER],
    "openai, arguments as text": [
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "content": "cold"},
        ANSWER,
    ],
    "openai, one function call": [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function", "content": "cold"},
        ANSWER,
    ],
    "ms-swift": [
        USER,
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"role": "tool_response", "content": "cold"},
        ANSWER,
    ],
    "ShareGPT": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "cold"},
        {"from": "gpt", "value": "a"},
    ],
    "bare calls": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]}, {"role": "tool", "content": "cold"}, ANSWER],
    "Anthropic": [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}}]},
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "cold"}]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_a_tool_call_gives_one_form(dialect: str) -> None:
    row = whole(DIALECTS[dialect])
    assert row.messages == [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "cold"}, ANSWER]
    assert row.tools == [TOOL]
    assert normalise(RawRow({"messages": row.messages, "tools": row.tools}, "a", 1)).messages == row.messages, "the form itself is read as it is"


def test_calls_keep_their_ids_and_go_with_the_turn_before_them() -> None:
    call = {"id": "c1", **CALL}
    messages = [
        USER,
        {"role": "assistant", "content": "let me see", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": {"t": 3}},
    ]
    row = whole([*messages, ANSWER])
    assert row.messages[1]["tool_calls"] == [call]
    assert row.messages[2] == {"role": "tool", "tool_call_id": "c1", "content": '{"t": 3}'}
    text = json.dumps(CALL["function"])
    joined = whole([USER, {**ANSWER, "content": "see"}, {"role": "tool_call", "content": text}, {"role": "tool_call", "content": text}, ANSWER])
    assert [message["role"] for message in joined.messages] == ["user", "assistant", "assistant"]
    assert joined.messages[1] == {"role": "assistant", "content": "see", "tool_calls": [CALL, CALL]}


def test_anthropic_blocks_keep_order_ids_and_reasoning() -> None:
    row = whole(
        [
            USER,
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "cold"}, {"type": "text", "text": "and now?"}]},
            ANSWER,
        ]
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}, "id": "t1"}
    assert row.messages[1] == {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    assert row.messages[2] == {"role": "tool", "content": "cold", "tool_call_id": "t1"}
    assert row.messages[3] == {"role": "user", "content": "and now?"}


@pytest.mark.parametrize(
    "given",
    [
        [TOOL],
        TOOL,
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{"name": "weather", "description": "d", "input_schema": PARAMETERS}],
        [{**TOOL["function"], "type": "function"}],
    ],
)
def test_every_dialect_of_a_schema_gives_openais(given: Any) -> None:
    assert read_tools(RAW, given) == [TOOL]


def test_no_tools_are_none() -> None:
    assert [read_tools(RAW, value) for value in (None, "", [], "[]")] == [None] * 4


def test_loss_is_a_bool_and_other_keys_stay() -> None:
    marks = [{**ANSWER, "loss": mark, "loss_scale": 0.5} for mark in (True, 0, 1.0)] + [{**ANSWER, "weight": 0}]
    messages = whole([USER, *marks]).messages
    assert [message["loss"] for message in messages[1:]] == [True, False, True, False]
    assert messages[1]["loss_scale"] == 0.5
    assert all(isinstance(message["loss"], bool) for message in messages[1:])


def test_a_source_may_name_the_parts_of_a_message() -> None:
    given = MessageNames(("who",), ("says",), {"Q": "user", "A": "assistant"})
    assert read_messages(RAW, "m", [{"who": "Q", "says": "q"}, {"who": "A", "says": "a"}], given) == [USER, ANSWER]
    with pytest.raises(DataError, match=r"^a\.jsonl:3: m\[0\]\.who is 'B', wanted one of system"):
        read_messages(RAW, "m", [{"who": "B", "says": "q"}], given)


@pytest.mark.parametrize(
    ("turn", "tools", "message"),
    [
        ({"tool_calls": [CALL]}, None, "messages[1].tool_calls[0] calls 'weather', but the row has no tools; give its schema in the column tools"),
        ({"tool_calls": [{"name": "x"}]}, (TOOL,), "messages[1].tool_calls[0] calls 'x', wanted one of the row's tools: weather; give its schema"),
        ({"tool_calls": "x"}, (TOOL,), "messages[1].tool_calls is 'x', wanted a list of calls"),
        ({"tool_calls": [{}]}, (TOOL,), "messages[1].tool_calls[0] is an object with the keys (none), wanted a call such as"),
        (
            {"tool_calls": [{"name": "weather", "arguments": "x"}]},
            (TOOL,),
            "messages[1].tool_calls[0]: the arguments of weather are 'x', wanted a JSON",
        ),
        ({"content": "a"}, "x", "tools is 'x', wanted a list of tool schemas"),
        ({"content": "a"}, [{"type": "function"}], "tools[0] is an object with the keys type, wanted a schema such as"),
        ({"content": "a"}, [{"name": "f", "parameters": 3}], "tools[0]: the parameters of f are 3, wanted a JSON schema"),
        (
            {"role": "tool", "content": "x"},
            (TOOL,),
            "messages[1] is a tool turn, but no tool was called before it; wanted an assistant turn with tool",
        ),
        ({"role": "tool_call", "content": "x"}, (TOOL,), "messages[1].content is 'x', wanted a call such as"),
    ],
)
def test_faults_of_tools(turn: dict[str, Any], tools: Any, message: str) -> None:
    assert fault([USER, {"role": "assistant", "content": None, **turn}, ANSWER], tools).startswith(message)
