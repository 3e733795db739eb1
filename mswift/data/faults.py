"""How a fault of a row is said: file, line, field, what was got and what was wanted, on one line."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from mswift.errors import DataError


class Placed(Protocol):
    """Anything with a place: a raw row, or a whole one."""

    @property
    def where(self) -> str: ...


def fail(raw: Placed, what: str) -> NoReturn:
    """Raises `DataError` with the place of the row in front."""
    raise DataError(f"{raw.where}: {what}")


def got(value: Any) -> str:
    """A value as an error shows it: short, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with the keys {names(value)}"
    return repr(value if not isinstance(value, str) or len(value) <= 40 else value[:37] + "...")


def names(data: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in data) or "(none)"


def text(raw: Placed, field: str, value: Any) -> str:
    """A string of whole characters, or `DataError`."""
    if not isinstance(value, str):
        fail(raw, f"{field} is {got(value)}, wanted a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            fail(raw, f"{field} holds half of a surrogate pair (a broken \\ud8.. escape), wanted whole characters; write the file as UTF-8")
    return value


def unpacked(value: Any) -> Any:
    """What a cell of text holds, for formats that have no lists: JSON, or else a Python literal; anything else stays as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
