"""Jinja as chat templates expect it: the environment that transformers gives them, compiled once and without its copies of every message.

What a template sees is the same as in `PreTrainedTokenizerBase.apply_chat_template` (tests/unit/templates hold this, token for token).
"""

from __future__ import annotations

import datetime
import functools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text has them
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OF_LOOPS = {name: operator.attrgetter(name) for name in ("first", "last", "index", "index0", "length")}
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template or its rendering raises over messages that it cannot take."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` blocks: what the assistant writes. Their ends are marked in the text where ``mark_generation`` is set."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = jinja2.nodes.Name("mark_generation", "load")
        return jinja2.nodes.CallBlock(self.call_method("_wrap", [marked]), [], [], body).set_lineno(line)

    def _wrap(self, marked: Any, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}" if marked is True else caller()


class _Dict:
    """``dict(...)`` of a template, without the class and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which lets what every turn asks of its loop through without looking for something unsafe in it."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is LoopContext and attribute in _OF_LOOPS:
            return _OF_LOOPS[attribute](obj)
        return super().getattr(obj, attribute)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """A template ready to render. Raises `jinja2.TemplateSyntaxError`."""
    return _environment().from_string(text)


def parse_template(text: str) -> jinja2.nodes.Template:
    """The syntax of a template. Raises `jinja2.TemplateSyntaxError`."""
    return _environment().parse(text)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update({"raise_exception": _raise, "strftime_now": _now, "dict": _Dict()})
    return environment


def render(
    template: jinja2.Template,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    kwargs: Mapping[str, Any],
    mark_generation: bool = False,
) -> str:
    """The text of a conversation; any of `REFUSALS` where the template cannot take it."""
    return template.render(
        messages=[with_reasoning(message) for message in messages],
        tools=list(tools) or None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        mark_generation=mark_generation,
        **kwargs,
    )


def split_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and the ranges ``[start, end)`` of the ``{% generation %}`` blocks in it (an inner one belongs to the outer)."""
    ranges: list[tuple[int, int]] = []
    pieces: list[str] = []
    depth = length = start = 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if part == _OPEN:
            start = start if depth else length
            depth += 1
        elif part == _CLOSE:
            depth -= 1
            ranges += [] if depth else [(start, length)]
        else:
            pieces.append(part)
            length += len(part)
    return "".join(pieces), ranges


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under all the names that templates read."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
