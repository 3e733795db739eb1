"""What a message says: text, blocks of OpenAI's and Anthropic's, and the images, audio and video that go with a row.

Media are looked at (is there such a file, is it a URL, is the data URI whole) and kept; what a model sees of them is not decided here.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mswift.data.faults import Placed, fail, got, text, unpacked

MEDIA = ("image", "audio", "video")
_TEXT_TYPES = ("text", "input_text", "output_text")
_BLOCK_TYPES = (*_TEXT_TYPES[:1], *MEDIA, "image_url", "audio_url", "video_url", "input_audio", "tool_use", "tool_result", "thinking")
_URL = re.compile(r"(?:https?|s3|gs|oss|hf)://\S+")
_DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,")


@dataclass(slots=True)
class Content:
    """A content taken apart: what is said, calls with the number of their block, answers of tools as messages without a role, reasoning."""

    content: str | list[dict[str, Any]] = ""
    calls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    thinking: str = ""


def read_content(raw: Placed, where: str, role: str, value: Any) -> Content:
    """A string, or a list of blocks; what a tool answers may be any JSON value, which is then its text.

    Raises:
        DataError: with the block at fault.
    """
    if isinstance(value, list) and (role != "tool" or all(isinstance(item, dict) and "type" in item for item in value)):
        return _read_blocks(raw, where, role, value)
    if role == "tool" and isinstance(value, (dict, list, int, float)):
        return Content(json.dumps(value, ensure_ascii=False))
    return Content(text(raw, where, value))


def _read_blocks(raw: Placed, where: str, role: str, blocks: list[Any]) -> Content:
    found, parts = Content(), list[dict[str, Any]]()
    for i, block in enumerate(blocks):
        at = f"{where}[{i}]"
        if isinstance(block, str):
            block = {"type": "text", "text": block}
        if not isinstance(block, dict):
            fail(raw, f"{at} is {got(block)}, wanted a block such as {{type: text, text: ...}}")
        kind = block.get("type")
        if kind in _TEXT_TYPES:
            parts.append({"type": "text", "text": text(raw, f"{at}.text", block.get("text"))})
        elif kind == "thinking" and role == "assistant":
            found.thinking += text(raw, f"{at}.thinking", block.get("thinking"))
        elif kind == "tool_use" and role == "assistant":
            found.calls.append((i, {key: block.get(key) for key in ("id", "name", "input")}))
        elif kind == "tool_result" and role == "user":
            found.results.append(_result(raw, at, block))
        elif _media_kind(kind) is not None:
            parts.append(_media_block(raw, at, block))
        else:
            fail(raw, f"{at}.type is {got(kind)} in a turn of role {role}, wanted one of {', '.join(_BLOCK_TYPES)}")
    only_text = all(part["type"] == "text" for part in parts)
    found.content = "".join(part["text"] for part in parts) if only_text else parts
    return found


def _result(raw: Placed, where: str, block: dict[str, Any]) -> dict[str, Any]:
    inner = read_content(raw, f"{where}.content", "tool", block.get("content") if block.get("content") is not None else "")
    called = block.get("tool_use_id")
    return {"content": inner.content, **({"tool_call_id": called} if called else {})}


def _media_kind(kind: Any) -> str | None:
    if not isinstance(kind, str):
        return None
    return next((name for name in MEDIA if kind in (name, f"{name}_url", f"input_{name}")), None)


def _media_block(raw: Placed, where: str, block: dict[str, Any]) -> dict[str, Any]:
    kind = _media_kind(block["type"])
    assert kind is not None
    value = next((block[key] for key in (kind, f"{kind}_url", f"input_{kind}", "source", "url", "path") if block.get(key) is not None), None)
    if value is None:  # a place that a column of the row fills
        return {"type": kind}
    if isinstance(value, dict) and "data" in value:
        media_type = value.get("media_type") or f"{kind}/{value.get('format', 'png')}"
        value = f"data:{media_type};base64,{value['data']}"
    elif isinstance(value, dict) and isinstance(value.get("url"), str):
        value = value["url"]
    return {"type": kind, kind: check_medium(raw, f"{where}.{block['type']}", value)}


def read_media(raw: Placed, name: str, value: Any) -> list[Any]:
    """The media of a column such as ``images``: one, or a list of them.

    Raises:
        DataError: with the entry at fault.
    """
    value = unpacked(value)
    values = value if isinstance(value, list) else [value]
    return [check_medium(raw, f"{name}[{i}]", item) for i, item in enumerate(values)]


def check_medium(raw: Placed, where: str, value: Any) -> Any:
    """A path that exists (from the working directory or from the folder of the data file), a URL, a whole data URI, or ``{bytes | path | url}``.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, dict):
        inner = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
        if inner is None:
            fail(raw, f"{where} is {got(value)}, wanted one with bytes, path or url")
        return value if isinstance(inner, (bytes, list)) else {**value, "path": check_medium(raw, f"{where}.path", inner)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if not isinstance(value, str) or not value:
        fail(raw, f"{where} is {got(value)}, wanted a path, a URL, a data URI or an object with bytes or path")
    check = next((check for begins, check in _CHECKS if value.startswith(begins)), _check_path)
    return check(raw, where, value)


def _check_data_uri(raw: Placed, where: str, value: str) -> str:
    head = _DATA_URI.match(value)
    try:
        if head is None:
            raise binascii.Error("it has no ;base64,")
        base64.b64decode(value[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        fail(raw, f"{where} is a data URI that cannot be read ({error}), wanted data:image/png;base64,...")
    return value


def _check_url(raw: Placed, where: str, value: str) -> str:
    if not _URL.fullmatch(value):
        fail(raw, f"{where} is {got(value)}, wanted a whole URL without spaces")
    return value


def _check_path(raw: Placed, where: str, value: str) -> str:
    if os.path.exists(os.path.expanduser(value)):
        return value
    beside = Path(raw.where.rpartition(":")[0]).parent / value
    if not beside.exists():
        fail(raw, f"{where} is {got(value)}: there is no such file in {os.getcwd()} or beside the data; wanted a path, a URL or a data URI")
    return str(beside)


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Placed, str, str], str]], ...] = (
    (("data:",), _check_data_uri),
    (("http://", "https://", "s3://", "gs://", "oss://", "hf://"), _check_url),
)
