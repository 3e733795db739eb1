"""Tool calls out of what a model writes: the way back from each format in which templates write them.

A format is told by the template itself (`find_format`), and `parse_answer` undoes what the template wrote: rendering a call and parsing the turn
gives the call again. What is no whole call stays in the text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mswift.templates.conversation import Tool
from mswift.templates.tools import ToolCall

Found: TypeAlias = tuple[int, int, list[ToolCall]]
"""Where in the text calls stand (characters ``[start, end)``), and the calls."""
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer: what it says beside its calls, and the calls in order."""

    content: str
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class Format:
    """One way of writing calls.

    Args:
        markers: texts that a template holds if it writes this format, all of them; none: only a dialect does. find: the calls of an answer.
    """

    markers: tuple[str, ...]
    find: Callable[[str, Mapping[str, Any]], Iterator[Found]]


def find_format(template_text: str) -> str | None:
    """The name of the format in which a template writes calls; None where it writes none that is known."""
    found = (name for name, known in FORMATS.items() if known.markers and all(marker in template_text for marker in known.markers))
    return next(found, None)


def parse_answer(text: str, name: str, tools: Sequence[Tool] = ()) -> Parsed:
    """Splits an answer (special tokens included, its end left out) into text and calls.

    Args:
        name: of `FORMATS`. tools: schemas; formats without JSON need them to tell the text ``1`` from the number 1.
    """
    schemas = {tool["function"]["name"]: (tool["function"].get("parameters") or {}).get("properties") or {} for tool in tools}
    calls: list[ToolCall] = []
    kept, at = [], 0
    for start, end, found in FORMATS[name].find(text, schemas):
        kept.append(text[at:start])
        calls += found
        at = end
    kept.append(text[at:])
    return Parsed("".join(kept).strip() if calls else text, tuple(calls))


def _call(name: Any, arguments: Any) -> list[ToolCall]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            return []
    good = isinstance(name, str) and name and isinstance(arguments, dict)
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}] if good else []


def _from_object(value: Any) -> list[ToolCall]:
    if not isinstance(value, dict):
        return []
    return _call(value.get("name"), value.get("arguments", value.get("parameters", {})))


def _json_at(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value that begins at a place (white space before it left aside), and where it ends."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        return None


def _tagged_json(opening: str, closing: str) -> Callable[[str, Mapping[str, Any]], Iterator[Found]]:
    """One or more JSON objects between two tags, as Hermes, Qwen, Granite and MiniMax-M1 have it."""

    def find(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
        at = 0
        while (start := text.find(opening, at)) >= 0:
            at = start + len(opening)
            calls: list[ToolCall] = []
            while (read := _json_at(text, at)) is not None:
                calls += _from_object(read[0])
                at = read[1]
            closed = re.compile(rf"\s*(?:{re.escape(closing)}|$)").match(text, at)
            if calls and closed:
                at = closed.end()
                yield start, at, calls

    return find


def _llama3(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    """The answer is a JSON object with ``parameters``, or several with ``;`` between them."""
    stripped = re.match(r"\s*(?:<\|python_tag\|>)?\s*", text)
    at = stripped.end() if stripped else 0
    calls: list[ToolCall] = []
    while text[at : at + 1] == "{" and (read := _json_at(text, at)) is not None:
        calls += _from_object(read[0])
        at = read[1]
        separator = re.compile(r"\s*;\s*").match(text, at)
        at = separator.end() if separator else at
    if calls and not text[at:].strip():
        yield 0, len(text), calls


def _mistral(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    """``[TOOL_CALLS]`` and a JSON list (v3, Nemo), or name, perhaps an id, and arguments (Small 3.2)."""
    at = 0
    while (start := text.find("[TOOL_CALLS]", at)) >= 0:
        at = start + len("[TOOL_CALLS]")
        named = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\](\w+))?\[ARGS\]").match(text, at)
        read = _json_at(text, named.end() if named else at)
        if read is None:
            continue
        at = read[1]
        if named:
            yield start, at, [{**call, **({"id": named[2]} if named[2] else {})} for call in _call(named[1], read[0])]
        elif isinstance(read[0], list):
            calls = [(item, call) for item in read[0] for call in _from_object(item)]
            yield start, at, [{**call, **({"id": item["id"]} if "id" in item else {})} for item, call in calls]


def _deepseek(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    """``<｜tool▁call▁begin｜>`` and ``function``, name and fenced JSON (V3, R1), or name and JSON (V3.1)."""
    for block in re.finditer(r"<｜tool▁calls▁begin｜>(.*?)(?:<｜tool▁calls▁end｜>|$)", text, re.DOTALL):
        calls: list[ToolCall] = []
        for head, body in re.findall(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", block[1], re.DOTALL):
            fenced = re.fullmatch(r"(.*?)\n```json\n(.*)\n```", body, re.DOTALL)
            calls += _call(fenced[1], fenced[2]) if fenced else _call(head, body)
        yield block.start(), block.end(), calls


def _kimi(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    one = re.compile(r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>", re.DOTALL)
    for block in re.finditer(r"<\|tool_calls_section_begin\|>(.*?)(?:<\|tool_calls_section_end\|>|$)", text, re.DOTALL):
        calls: list[ToolCall] = []
        for name, body in one.findall(block[1]):
            plain = re.fullmatch(r"(?:functions\.)?(.+?)(?::\d+)?", name.strip())
            calls += [{"id": name.strip(), **call} for call in _call(plain[1] if plain else "", body)]
        yield block.start(), block.end(), calls


def _harmony(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    """gpt-oss: the recipient ``functions.NAME`` in the header before or after the channel, and JSON as the message."""
    recipient = r"[^<]*?to=functions\.([\w.-]+)"
    header = rf"(?:<\|start\|>assistant)?(?:{recipient}\s*<\|channel\|>commentary|<\|channel\|>commentary{recipient})"
    for match in re.finditer(header + r"[^<]*(?:<\|constrain\|>)?[^<]*<\|message\|>(.*?)(?:<\|call\|>|<\|end\|>|$)", text, re.DOTALL):
        calls = _call(match[1] or match[2], match[3])
        if calls:
            yield match.start(), match.end(), calls


def _glm(text: str, schemas: Mapping[str, Any]) -> Iterator[Found]:
    for match in re.finditer(r"<tool_call>\s*([\w.:/-]+)\s*((?:<arg_key>.*?)?)\s*</tool_call>", text, re.DOTALL):
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", match[2], re.DOTALL)
        yield match.start(), match.end(), _from_pairs(match[1], pairs, schemas)


def _tagged_parameters(outer: tuple[str, str], call: str, parameter: str, *, newlines: bool) -> Callable[[str, Mapping[str, Any]], Iterator[Found]]:
    """Calls with a tag for each parameter, as Qwen3-Coder, Seed-OSS and MiniMax-M2 have it.

    Args:
        outer: tags around one or more calls. call, parameter: expressions with two groups, name and body. newlines: one stands around a value.
    """

    def find(text: str, schemas: Mapping[str, Any]) -> Iterator[Found]:
        for block in re.finditer(rf"{re.escape(outer[0])}(.*?)(?:{re.escape(outer[1])}|$)", text, re.DOTALL):
            calls: list[ToolCall] = []
            for name, body in re.findall(call, block[1], re.DOTALL):
                pairs = re.findall(parameter, body, re.DOTALL)
                bare = [(key, value.removeprefix("\n").removesuffix("\n") if newlines else value) for key, value in pairs]
                calls += _from_pairs(name, bare, schemas)
            if calls:
                yield block.start(), block.end(), calls

    return find


def _worded(action: str, arguments: str) -> Callable[[str, Mapping[str, Any]], Iterator[Found]]:
    """A word and the name, a word and the arguments in JSON (ReAct); after the last one the place of the result may be open."""
    head = re.compile(rf"(?m)^[ \t]*{re.escape(action)}[ \t]*([^\n]+?)[ \t]*\n[ \t]*{re.escape(arguments)}")
    tail = re.compile(r"\s*(?:Observation:|✿RESULT✿:)?\s*$")

    def find(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
        at = 0
        while (match := head.search(text, at)) is not None:
            read = _json_at(text, match.end())
            calls = _call(match[1], read[0]) if read is not None else []
            at = match.end() if read is None else read[1]
            end = tail.match(text, at)
            if calls:
                yield match.start(), end.end() if end else at, calls

    return find


def _hunyuan(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    one = re.compile(r"<tool_call>\s*([^\n<]+?)\s*\n```json\n(.*?)\n```\s*</tool_call>", re.DOTALL)
    for block in re.finditer(r"<tool_calls>(.*?)(?:</tool_calls>|$)", text, re.DOTALL):
        calls = [call for name, body in one.findall(block[1]) for call in _call(name, body)]
        if calls:
            yield block.start(), block.end(), calls


def _granite(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    """``<|tool_call|>`` and a JSON list."""
    for match in re.finditer(re.escape("<|tool_call|>"), text):
        read = _json_at(text, match.end())
        calls = [call for item in read[0] for call in _from_object(item)] if read is not None and isinstance(read[0], list) else []
        if read is not None and calls:
            yield match.start(), read[1], calls


def _lfm2(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    """A list of calls as Python writes them, between two tags."""
    for block in re.finditer(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|$)", text, re.DOTALL):
        calls, at = list[ToolCall](), block[1].find("[") + 1
        while (head := re.compile(r"[\s,]*([\w.-]+)\(").match(block[1], at)) is not None:
            read = _python_call(block[1], head.end())
            if read is None:
                break
            calls += _call(head[1], read[0])
            at = read[1]
        if calls:
            yield block.start(), block.end(), calls


def _python_call(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The keywords of a call whose parenthesis was opened before `start`, and where it is closed."""
    end = text.find(")", start)
    while end >= 0:
        try:
            call = ast.parse(f"f({text[start : end + 1]}", mode="eval").body
            assert isinstance(call, ast.Call)
            found: dict[str, Any] = {}
            for keyword in call.keywords:
                found |= {keyword.arg: ast.literal_eval(keyword.value)} if keyword.arg else ast.literal_eval(keyword.value)
            return found, end + 1
        except (ValueError, SyntaxError, TypeError, AssertionError):
            end = text.find(")", end + 1)
    return None


def _glm4(text: str, _schemas: Mapping[str, Any]) -> Iterator[Found]:
    """Name and JSON on two lines, a turn of its own for each call."""
    for match in re.finditer(r"(?:^|<\|assistant\|>)([\w.:/-]+)\n(?=\{)", text):
        read = _json_at(text, match.end())
        calls = _call(match[1], read[0]) if read is not None else []
        if read is not None and calls and re.match(r"\s*(?:<\|assistant\|>|<\|observation\|>|$)", text[read[1] :]):
            yield match.start(), read[1], calls


def _from_pairs(name: str, pairs: Sequence[tuple[str, str]], schemas: Mapping[str, Any]) -> list[ToolCall]:
    properties = schemas.get(name, {})
    return _call(name, {key: _value(value, properties.get(key)) for key, value in pairs})


def _value(text: str, schema: Any) -> Any:
    """A value that was written without quotes: a string where the schema says so, else what it is as JSON or in Python, else a string."""
    allowed = schema.get("type") if isinstance(schema, Mapping) else None
    if allowed == "string":
        return text
    for read in (json.loads, ast.literal_eval):  # some templates write values as Python shows them
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


FORMATS: dict[str, Format] = {
    "harmony": Format(("<|channel|>", "to="), _harmony),
    "kimi": Format(("<|tool_call_argument_begin|>",), _kimi),
    "deepseek": Format(("<｜tool▁call▁begin｜>",), _deepseek),
    "mistral": Format(("[TOOL_CALLS]",), _mistral),
    "glm": Format(("<arg_key>",), _glm),
    "minimax_m2": Format(
        ("minimax:tool_call",),
        _tagged_parameters(
            ("<minimax:tool_call>", "</minimax:tool_call>"),
            r'<invoke name="([^"]+)">(.*?)</invoke>',
            r'<parameter name="([^"]+)">(.*?)</parameter>',
            newlines=False,
        ),
    ),
    "seed": Format(
        ("seed:tool_call", "<parameter="),
        _tagged_parameters(
            ("<seed:tool_call>", "</seed:tool_call>"), r"<function=([^>]+)>(.*?)</function>", r"<parameter=([^>]+)>(.*?)</parameter>", newlines=False
        ),
    ),
    "qwen_coder": Format(
        ("<tool_call>", "<parameter="),
        _tagged_parameters(
            ("<tool_call>", "</tool_call>"), r"<function=([^>]+)>(.*?)</function>", r"<parameter=([^>]+)>(.*?)</parameter>", newlines=True
        ),
    ),
    "hunyuan": Format(("<tool_calls>", "function_arguments_in_json_format"), _hunyuan),
    "minimax_m1": Format(("<tool_calls>",), _tagged_json("<tool_calls>", "</tool_calls>")),
    "hermes": Format(("<tool_call>",), _tagged_json("<tool_call>", "</tool_call>")),
    "llama3": Format(("<|start_header_id|>", '"parameters"'), _llama3),
    "granite": Format(("<|tool_call|>", "available_tools"), _granite),
    "lfm2": Format(("<|tool_list_start|>",), _lfm2),
    "glm4": Format(("# 可用工具",), _glm4),
    "react": Format((), _worded("Action:", "Action Input:")),
    "flowers": Format((), _worded("✿FUNCTION✿:", "✿ARGS✿:")),
}
"""Name -> format; the first whose markers a template has is its own."""
