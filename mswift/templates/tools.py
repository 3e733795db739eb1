"""Tool schemas and tool calls as OpenAI writes them: what is wrong with them is said with its place, and every template gets the form it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from mswift.errors import DataError
from mswift.templates.conversation import Conversation, Message, Tool

ToolCall: TypeAlias = dict[str, Any]
"""``{"type": "function", "function": {"name": str, "arguments": dict}}``, perhaps with an ``id``."""

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def check_tools(conversation: Conversation) -> None:
    """Look at every schema, and at every call of a tool against its schema.

    Raises:
        DataError: a schema or a call is not of OpenAI's form, a call has no schema, or its arguments do not fit it; with the place in the row.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(conversation.tools):
        name, parameters = _read_tool(tool, f"tools[{index}]")
        schemas[name] = parameters
    for where, call in calls_of(conversation.messages):
        name, arguments = read_call(call, where)
        if name not in schemas:
            known = ", ".join(schemas) or "none: the row has no tools"
            raise DataError(f"{where} calls {name!r}, which has no schema; the tools are {known}; add its schema to the row's tools")
        fault = next(_faults(arguments, schemas[name], "arguments"), None)
        if fault is not None:
            raise DataError(f"{where} ({name}): {fault}")


def calls_of(messages: Sequence[Message]) -> Iterator[tuple[str, ToolCall]]:
    """Every tool call of a conversation with its place, such as ``messages[2].tool_calls[0]``."""
    for i, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise DataError(f"messages[{i}].tool_calls is {_kind(calls)}, wanted a list of calls")
        yield from ((f"messages[{i}].tool_calls[{j}]", call) for j, call in enumerate(calls))


def read_call(call: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call; arguments may be an object or its JSON text. Raises `DataError`."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f'{where} is no tool call, wanted {{"type": "function", "function": {{"name": ..., "arguments": {{...}}}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise DataError(f"{where} ({function['name']}): the arguments are no JSON ({error.msg} at character {error.pos}); mend them") from error
    if not isinstance(arguments, dict):
        raise DataError(f"{where} ({function['name']}): the arguments are {_kind(arguments)}, wanted an object")
    return function["name"], arguments


def write_call(call: ToolCall, where: str, *, as_text: bool) -> ToolCall:
    """A call with its arguments as an object, or as JSON text for templates that join it to other text."""
    name, arguments = read_call(call, where)
    written: Any = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    return {"type": "function", **call, "function": {**call["function"], "name": name, "arguments": written}}


def add_ids(messages: Sequence[Message], *, named: bool) -> list[Message]:
    """Gives an id to calls and answers that lack one, the same for the same conversation; answers belong to calls in their order.

    Args:
        named: ids as Kimi writes them (``functions.get_weather:0``), else nine letters and digits as Mistral's templates want them.
    """
    done: list[Message] = []
    waiting: list[str] = []
    count = 0
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                new = f"functions.{call['function']['name']}:{count}" if named else _nine(count, call["function"])
                calls.append({"id": new, **call} if not call.get("id") else call)
                count += 1
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message.get("role") == "tool" and waiting:
            given = message.get("tool_call_id") or waiting[0]
            waiting = [waiting_id for waiting_id in waiting if waiting_id != given]
            message = {**message, "tool_call_id": given}
        done.append(message)
    return done


def _nine(count: int, function: Mapping[str, Any]) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    seed = json.dumps([count, function["name"], function["arguments"]], sort_keys=True, default=str)
    return "".join(letters[byte % len(letters)] for byte in hashlib.blake2b(seed.encode("utf8", "replace"), digest_size=9).digest())


def _read_tool(tool: Tool, where: str) -> tuple[str, Mapping[str, Any]]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            f'{where} is no tool schema, wanted {{"type": "function", "function": {{"name": ..., "description": ..., "parameters": {{...}}}}}}'
        )
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise DataError(f"{where} ({function['name']}): parameters is {_kind(parameters)}, wanted a JSON schema of type object")
    return function["name"], parameters


def _faults(value: Any, schema: Any, path: str) -> Iterator[str]:
    """What of a value does not fit a JSON schema: types, enums, missing and unknown names; other keywords are passed over."""
    if not isinstance(schema, Mapping):
        return
    allowed = schema.get("type")
    names = [name for name in ([allowed] if isinstance(allowed, str) else allowed or []) if name in _TYPES]
    if schema.get("nullable"):
        names += ["null"] if names else []
    if names and not any(_is(value, name) for name in names):
        yield f"{path} is {_kind(value)}, wanted {' or '.join(names)}"
        return
    if isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        yield f"{path} is {_kind(value)}, wanted one of {', '.join(map(repr, schema['enum']))}"
    if isinstance(value, dict):
        yield from _object_faults(value, schema, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(item, schema.get("items"), f"{path}[{index}]")


def _object_faults(value: dict[str, Any], schema: Mapping[str, Any], path: str) -> Iterator[str]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list) else ():
        if name not in value:
            yield f"{path}.{name} is missing, which the schema requires; got {', '.join(value) or 'nothing'}"
    for name, item in value.items():
        if name in properties:
            yield from _faults(item, properties[name], f"{path}.{name}")
        elif schema.get("additionalProperties") is False or (properties and path == "arguments" and "additionalProperties" not in schema):
            yield f"{path}.{name} is not in the schema, which has {', '.join(properties) or 'no properties'}"


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
