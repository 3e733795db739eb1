"""What a flag is: a dataclass field with a help text, and the reading of one value from the command line or a file.

Sections declare fields with `option`; `flags_of` turns a section class into `Flag` values, which parse, check and describe themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mswift.errors import ConfigError

Kind = Literal["text", "int", "float", "bool", "list", "dict"]
_KINDS: dict[Any, Kind] = {str: "text", int: "int", float: "float", bool: "bool", list: "list", dict: "dict"}
_METAVARS: dict[Kind, str] = {"text": "TEXT", "int": "N", "float": "X", "bool": "true|false", "list": "A B ...", "dict": "JSON"}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a number (`low`, `high` belong to the range, `above`, `below` do not) or the pattern of a text."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    pattern: str | None = None

    def hold(self, value: Any) -> bool:
        if self.pattern is not None:
            return re.fullmatch(self.pattern, value) is not None
        return not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def describe(self) -> str:
        """Such as ``of at least 0 and below 1``; empty without bounds."""
        parts = [
            f"{word} {bound:g}"
            for word, bound in (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
            if bound is not None
        ]
        return " and ".join(parts)


def option(
    default: Any, help: str, *, auto: str = "", metavar: str = "", secret: bool = False, wanted: str = "", limits: Limits | None = None, **bounds: Any
) -> Any:
    """A dataclass field that is a flag.

    Args:
        default: value when the flag is not given; lists and dicts are copied. help: one line for ``--help``.
        auto: what a default of None or "" means, for ``--help`` and the table of settings.
        metavar: placeholder of the value in ``--help``. secret: never written to a file. wanted: words for an error about a pattern.
        limits: bounds, or give them by name (`Limits`).
    """
    meta = {"help": help, "auto": auto, "metavar": metavar, "secret": secret, "wanted": wanted, "limits": limits or Limits(**bounds)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag: its name without dashes, the section it belongs to, its type and its limits."""

    name: str
    section: str
    kind: Kind
    optional: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    auto: str
    metavar: str
    secret: bool
    pattern_words: str
    limits: Limits

    def read(self, raw: Any, label: str) -> Any:
        """The value that `raw` stands for: text from the command line, or what YAML and JSON made of a value in a file.

        Args:
            label: how to name the flag in an error, such as ``--lora_rank`` or ``run.yaml: lora_rank``.

        Raises:
            ConfigError: the type, the choice or the range is wrong.
        """
        if raw is None or (self.optional and self.kind != "text" and isinstance(raw, str) and raw.lower() in ("none", "null")):
            if self.optional:
                return None
            raise self._error(raw, label)
        if self.kind == "list":
            return self._read_list(raw, label)
        value = _READERS[self.kind](raw)
        if value is None or not self._allowed(value):
            raise self._error(raw, label)
        return value

    def _read_list(self, raw: Any, label: str) -> list[str]:
        items = [raw] if isinstance(raw, str) else raw
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
            raise self._error(raw, label)
        if self.choices and items == ["none"]:
            return []
        for item in items:
            if not self._allowed(item):
                raise self._error(item, label)
        return list(items)

    def _allowed(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return self.kind in ("bool", "list", "dict") or self.limits.hold(value)

    def _error(self, raw: Any, label: str) -> ConfigError:
        hint = ""
        if self.choices and isinstance(raw, str):
            near = nearest(raw, self.choices)
            hint = f"; did you mean {near}?" if near else ""
        elif self.kind in ("text", "list") and any(not isinstance(item, str) for item in (raw if isinstance(raw, list) else [raw])):
            hint = "; put quotes around it"
        return ConfigError(f"{label}: got {shown(raw)}, wanted {self.wanted()}{hint}")

    def wanted(self) -> str:
        """What a value has to be, in words."""
        if self.choices:
            return f"{'one or more of' if self.kind == 'list' else 'one of'} {', '.join(self.choices)}"
        words = {
            "text": self.pattern_words or "a text",
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "list": "one or more texts",
            "dict": 'a JSON object such as {"from": "to"}',
        }[self.kind]
        bounds = self.limits.describe()
        return f"{words}, {bounds}" if bounds else words

    def placeholder(self) -> str:
        """The value's place in ``--help``, such as ``N`` or ``lora|full``."""
        if self.metavar or not self.choices:
            return self.metavar or _METAVARS[self.kind]
        return "|".join(self.choices) + (" ..." if self.kind == "list" else "")

    def shown_default(self) -> str:
        if self.default in (None, "", [], {}) and not isinstance(self.default, bool):
            return self.auto or "not set"
        return plain(self.default)


def plain(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def shown(raw: Any) -> str:
    """A wrong value as it goes into an error: quoted text, shortened to 80 characters."""
    text = plain(raw) if isinstance(raw, bool) else "nothing" if raw is None or raw == [] else repr(raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that looks most like `name`, or None."""
    import difflib

    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return found[0] if found else None


def _read_text(raw: Any) -> str | None:
    return raw if isinstance(raw, str) else None


def _read_int(raw: Any) -> int | None:
    if isinstance(raw, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", raw):
        return int(raw)
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    return raw if isinstance(raw, int) and not isinstance(raw, bool) else None


def _read_float(raw: Any) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        return None
    try:
        value = float(raw)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _read_bool(raw: Any) -> bool | None:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def _read_dict(raw: Any) -> dict[str, str] | None:
    import json

    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
    except json.JSONDecodeError:
        return None
    if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        return None
    return dict(value)


_READERS: dict[str, Any] = {"text": _read_text, "int": _read_int, "float": _read_float, "bool": _read_bool, "dict": _read_dict}


def _shape(hint: Any) -> tuple[Kind, bool, tuple[str, ...]]:
    """Kind, whether None is allowed, and choices of a type hint."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    optional = type(None) in members
    (inner,) = (member for member in members if member is not type(None))
    origin = typing.get_origin(inner)
    if origin is Literal:
        return "text", optional, typing.get_args(inner)
    item = typing.get_args(inner)[0] if origin is list else None
    return _KINDS[origin or inner], optional, typing.get_args(item) if typing.get_origin(item) is Literal else ()


@functools.cache
def flags_of(section_class: type, section: str) -> tuple[Flag, ...]:
    """The flags of a section class, in the order of its fields.

    Args:
        section: the name under which a config holds the section, such as ``optim``.
    """
    hints = typing.get_type_hints(section_class)
    found = []
    for entry in dataclasses.fields(section_class):
        kind, optional, choices = _shape(hints[entry.name])
        meta = dict(entry.metadata)
        meta["pattern_words"] = meta.pop("wanted")
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        found.append(Flag(name=entry.name, section=section, kind=kind, optional=optional, choices=choices, default=default, **meta))
    return tuple(found)
