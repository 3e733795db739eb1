"""Rows with two answers: the better one is the conversation, the other a second conversation with the same beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mswift.data.faults import Placed, fail, got, text
from mswift.data.messages import Message, MessageNames, read_messages
from mswift.data.shapes import Shape, unpacked_list


def has_rejected(data: Mapping[str, Any]) -> bool:
    """Whether a row brings a rejected answer, well formed or not."""
    return any(data.get(name) is not None for name in ("rejected", "rejected_response", "rejected_messages"))


def read_pair(shape: Shape) -> tuple[list[Message], list[Message]]:
    """The conversation with the chosen and the one with the rejected answer.

    Shapes: ``chosen`` and ``rejected`` beside a prompt or a conversation without its answer (texts, one message, or messages), or as two whole
    conversations; a whole conversation and ``rejected_response`` (text, or the messages behind the last user turn) or ``rejected_messages``.

    Raises:
        DataError: an answer is missing, or the two are equal.
    """
    raw, data = shape.raw, shape.data
    chosen, rejected = data.pop("chosen", None), data.pop("rejected", None)
    if chosen is not None and rejected is not None:
        pair = _two_answers(shape, chosen, rejected)
    else:
        messages = shape.conversation()
        if messages[-1]["role"] != "assistant":
            fail(raw, f"chosen is missing, and the conversation ends with a {messages[-1]['role']} turn, wanted the better answer; give it as chosen")
        pair = messages, _rejected(shape, messages, rejected)
    if pair[0] == pair[1]:
        fail(raw, "the chosen and the rejected answer are equal, wanted two different ones")
    return pair


def _two_answers(shape: Shape, chosen: Any, rejected: Any) -> tuple[list[Message], list[Message]]:
    raw, given = shape.raw, shape.given
    ends = [_answer(raw, name, value, given) for name, value in (("chosen", chosen), ("rejected", rejected))]
    if all(len(end) > 1 for end in ends) and not {"messages", "conversations", "conversation", "query", "prompt"} & set(shape.data):
        shape.name = "chosen/rejected"
        return ends[0], ends[1]
    shape.want = "prompt"
    begin = shape.conversation()
    shape.name = f"{shape.name}, chosen/rejected"
    whole = [end if end[: len(begin)] == begin else begin + end for end in ends]
    return whole[0], whole[1]


def _rejected(shape: Shape, messages: list[Message], rejected: Any) -> list[Message]:
    raw, data, given = shape.raw, shape.data, shape.given
    whole, answer = data.pop("rejected_messages", None), data.pop("rejected_response", rejected)
    if whole is not None:
        shape.name += ", rejected_messages"
        other = read_messages(raw, "rejected_messages", whole, given)
        system = messages[:1] if messages[0]["role"] == "system" and other[0]["role"] != "system" else []
        return system + other
    if answer is None:
        fail(raw, "the rejected answer is missing, wanted rejected, rejected_response or rejected_messages")
    shape.name += ", rejected_response"
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return messages[: last_user + 1] + _answer(raw, "rejected_response", answer, given)


def _answer(raw: Placed, name: str, value: Any, given: MessageNames) -> list[Message]:
    value = unpacked_list(value)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        messages = read_messages(raw, name, value, given)
        if messages[-1]["role"] != "assistant":
            fail(raw, f"{name} ends with a {messages[-1]['role']} turn, wanted an assistant turn")
        return messages
    if value is None:
        fail(raw, f"{name} is {got(value)}, wanted an answer")
    return [{"role": "assistant", "content": text(raw, name, value)}]
