"""One form for conversations, OpenAI's, out of the dialects that people write: messages, ShareGPT, ms-swift's tool turns, Anthropic's blocks.

The form: ``role`` is one of `ROLES`; ``content`` is a string, or a list of ``{"type": "text", "text"}`` and ``{"type": "image" | "audio" |
"video", <type>: path, URL, data URI or object}`` where it holds more than text; ``tool_calls`` is a list of ``{"type": "function", "function":
{"name", "arguments": object}}`` with the ``id`` that the row gave; a tool turn may have ``tool_call_id`` and ``name``; ``loss`` is a bool.
Other keys of a message stay. Tools are OpenAI's schemas.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mswift.data.content import read_content
from mswift.data.faults import Placed, fail, got, names, text, unpacked

Message: TypeAlias = dict[str, Any]
Tool: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool_response", "function_response", "function", "observation", "observations", "ipython"), "tool"),
    **dict.fromkeys(("tool_call", "function_call", "tool_calls"), "tool_call"),
}


@dataclass(frozen=True, slots=True)
class MessageNames:
    """How a source names the parts of a message; `roles` maps its names of roles to `ROLES`, before the names that everybody uses."""

    role_keys: tuple[str, ...] = ("role", "from")
    content_keys: tuple[str, ...] = ("content", "value")
    roles: dict[str, str] = field(default_factory=dict)


DEFAULT_NAMES = MessageNames()


def read_messages(raw: Placed, where: str, value: Any, given: MessageNames = DEFAULT_NAMES) -> list[Message]:
    """The conversation in `value`, in the one form.

    Args:
        where: how an error calls it, such as ``messages``.

    Raises:
        DataError: with file, line and the field at fault.
    """
    value = unpacked(value)
    if not isinstance(value, list):
        fail(raw, f"{where} is {got(value)}, wanted a list of {{role, content}}")
    if not value:
        fail(raw, f"{where} is an empty list, wanted at least a user and an assistant turn")
    messages: list[Message] = []
    for i, item in enumerate(value):
        for message in _read_item(raw, f"{where}[{i}]", item, given):
            _append(messages, message)
    return messages


def read_tools(raw: Placed, value: Any) -> list[Tool] | None:
    """The tools of a row as OpenAI's schemas; None where there are none.

    Raises:
        DataError: it is no list of schemas (OpenAI's with or without the ``function`` around it, or Anthropic's).
    """
    value = unpacked(value)
    if value in (None, "", [], {}):
        return None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list):
        fail(raw, f"tools is {got(value)}, wanted a list of tool schemas")
    return [_read_tool(raw, f"tools[{i}]", unpacked(tool)) for i, tool in enumerate(tools)]


def check_calls(raw: Placed, where: str, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Refuses a call of a tool that the row does not describe, and a tool turn that answers no call.

    Raises:
        DataError: with the message at fault.
    """
    known = {tool["function"]["name"] for tool in tools or ()}
    called = False
    for i, message in enumerate(messages):
        for j, call in enumerate(message.get("tool_calls", ())):
            called, name = True, call["function"]["name"]
            if name not in known:
                listed = f"wanted one of the row's tools: {', '.join(sorted(known))}" if known else "but the row has no tools"
                fail(raw, f"{where}[{i}].tool_calls[{j}] calls {got(name)}, {listed}; give its schema in the column tools")
        if message["role"] == "tool" and not called:
            fail(raw, f"{where}[{i}] is a tool turn, but no tool was called before it; wanted an assistant turn with tool_calls")


def _append(messages: list[Message], message: Message) -> None:
    """A turn that is a call and nothing else (role ``tool_call``) belongs to the assistant turn before it, if there is one."""
    if message["role"] != "tool_call":
        messages.append(message)
    elif messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
    else:
        messages.append({**message, "role": "assistant"})


def _read_item(raw: Placed, where: str, item: Any, given: MessageNames) -> Iterator[Message]:
    if not isinstance(item, dict):
        fail(raw, f"{where} is {got(item)}, wanted an object with role and content")
    data = {str(key): value for key, value in item.items() if value is not None or key in given.content_keys}
    role_key = next((key for key in given.role_keys if key in data), None)
    if role_key is None:
        yield from _read_round(raw, where, data, given)
        return
    named = data.pop(role_key)
    role = _role(raw, f"{where}.{role_key}", named, given)
    content_key = next((key for key in given.content_keys if key in data), None)
    content = data.pop(content_key) if content_key else None
    if content_key is None and not (role == "assistant" and ("tool_calls" in data or "function_call" in data)):
        fail(raw, f"{where} has no {given.content_keys[0]}, got the keys {names(item)}")
    if role == "tool_call":
        yield {"role": role, "content": "", "tool_calls": _calls_of_text(raw, f"{where}.{content_key}", content), **_rest(raw, where, data)}
    else:
        yield from _read_turn(raw, where, f"{where}.{content_key}", role, content, data)


def _read_round(raw: Placed, where: str, data: dict[str, Any], given: MessageNames) -> Iterator[Message]:
    """``{"human": ..., "assistant": ...}``: a question and an answer in one object."""
    turns = [(key, _ROLE_NAMES.get(key, given.roles.get(key, key))) for key in data]
    if not turns or any(role not in ("user", "assistant") for _, role in turns):
        fail(raw, f"{where} has no {given.role_keys[0]}, got the keys {names(data)}")
    for key, role in sorted(turns, key=lambda turn: turn[1] == "assistant"):
        yield {"role": role, "content": text(raw, f"{where}.{key}", data[key])}


def _role(raw: Placed, where: str, value: Any, given: MessageNames) -> str:
    role = given.roles.get(value, value) if isinstance(value, str) else ""
    role = role if role in ROLES else _ROLE_NAMES.get(role.lower().replace("-", "_"), "")
    if not role:
        fail(raw, f"{where} is {got(value)}, wanted one of {', '.join(ROLES)}")
    return role


def _read_turn(raw: Placed, where: str, content_where: str, role: str, content: Any, data: dict[str, Any]) -> Iterator[Message]:
    calls = _tool_calls(raw, where, data) if role == "assistant" else []
    found = read_content(raw, content_where, role, "" if content is None and calls else content)
    calls += [_call(raw, f"{content_where}[{i}]", call) for i, call in found.calls]
    yield from ({"role": "tool", **result} for result in found.results)
    if found.results and not found.content:
        return
    message: Message = {"role": role, "content": found.content}
    if found.thinking and "reasoning_content" not in data:
        message["reasoning_content"] = found.thinking
    yield {**message, **_rest(raw, where, data), **({"tool_calls": calls} if calls else {})}


def _rest(raw: Placed, where: str, data: dict[str, Any]) -> Message:
    """The other keys of a message: texts of whole characters, ``loss`` a bool (a ``weight`` of 0 or 1 is the same by OpenAI's name)."""
    for key, value in data.items():
        if isinstance(value, str):
            text(raw, f"{where}.{key}", value)
    for key in {"loss", "weight"} & set(data):
        if data[key] not in (0, 1):
            fail(raw, f"{where}.{key} is {got(data[key])}, wanted {'true or false' if key == 'loss' else '0 or 1'}")
    loss = data.get("loss", data.get("weight"))
    rest = {key: value for key, value in data.items() if key not in ("loss", "weight", "tool_calls", "function_call")}
    return rest if loss is None else {**rest, "loss": bool(loss)}


def _tool_calls(raw: Placed, where: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    calls = unpacked(data.get("tool_calls") or [])
    if not isinstance(calls, list):
        fail(raw, f"{where}.tool_calls is {got(calls)}, wanted a list of calls")
    read = [_call(raw, f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if data.get("function_call"):
        read.append(_call(raw, f"{where}.function_call", unpacked(data["function_call"])))
    return read


def _calls_of_text(raw: Placed, where: str, content: Any) -> list[dict[str, Any]]:
    """A ``tool_call`` turn's content: the JSON text of a call or of a list of them."""
    value = unpacked(content)
    calls = value if isinstance(value, list) else [value]
    return [_call(raw, where, call) for call in calls]


def _call(raw: Placed, where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        fail(raw, f'{where} is {got(call)}, wanted a call such as {{"name": "search", "arguments": {{"query": "x"}}}}')
    given: Any = next((function[key] for key in ("arguments", "input", "parameters") if function.get(key) is not None), {})
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given) if given.strip() else {}
        except ValueError:
            arguments = unpacked(given)
    if not isinstance(arguments, dict):
        fail(raw, f"{where}: the arguments of {function['name']} are {got(given)}, wanted a JSON object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**made, "id": call["id"]} if call.get("id") else made


def _read_tool(raw: Placed, where: str, tool: Any) -> Tool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        fail(raw, f'{where} is {got(tool)}, wanted a schema such as {{"type": "function", "function": {{"name": ..., "parameters": {{...}}}}}}')
    function = {key: value for key, value in function.items() if value is not None and (key != "type" or function is not tool)}
    if "input_schema" in function:
        function["parameters"] = function.pop("input_schema")
    parameters = unpacked(function.get("parameters", {}))
    if not isinstance(parameters, dict):
        fail(raw, f"{where}: the parameters of {function['name']} are {got(parameters)}, wanted a JSON schema")
    return {"type": "function", "function": {**function, **({"parameters": parameters} if "parameters" in function else {})}}
