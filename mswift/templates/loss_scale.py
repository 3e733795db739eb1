"""``--loss_scale``: which turns are trained, and how much each part of an answer counts.

A value is a base (``default``, ``last_round``, ``all``; ``default`` if left out) and strategies after it, joined by ``+``, as ms-swift writes
them: ``last_round+hermes+ignore_empty_think``. A strategy is a small JSON file, shipped (`STRATEGIES`) or the user's own:

* ``{"TEXT": [a, b]}``: wherever TEXT stands it counts a, and what follows it up to the next such text counts b;
* ``{"REGEX": [a]}``: what the expression matches counts a; ``^`` is the beginning of the answer, and ``.`` takes in line ends;
* ``{"response": {...}, "query": {"TEXT": [a]}}``: where the user's turn before it holds TEXT, the whole answer counts a.

All else counts 1. Weights of several strategies are multiplied.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from mswift.errors import ConfigError

Base: TypeAlias = Literal["default", "last_round", "all"]
BASES: tuple[str, ...] = get_args(Base)
_FOLDER = Path(__file__).with_name("strategies")
STRATEGIES: tuple[str, ...] = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
Span: TypeAlias = tuple[int, int, float]
"""First and last character ``[start, end)``, and the weight of what is between."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One file of weights.

    Args:
        delimiters: text -> its weight and that of what follows. patterns: regular expression -> weight. query: text -> weight of the answer.
    """

    delimiters: Mapping[str, tuple[float, float]]
    patterns: Mapping[str, float]
    query: Mapping[str, float]

    def spans(self, answer: str, query: str) -> list[Span]:
        """The parts of an answer that this strategy weighs; parts between them count 1."""
        for text, weight in self.query.items():
            if text in query:
                return [(0, len(answer), weight)]
        return self._after_delimiters(answer) if self.delimiters else self._matches(answer)

    def _after_delimiters(self, answer: str) -> list[Span]:
        found = list(re.finditer("|".join(map(re.escape, sorted(self.delimiters, key=len, reverse=True))), answer))
        ends = [match.start() for match in found[1:]] + [len(answer)] * bool(found)
        spans: list[Span] = []
        for match, end in zip(found, ends, strict=True):
            own, following = self.delimiters[match[0]]
            spans += [(match.start(), match.end(), own), (match.end(), end, following)]
        return spans

    def _matches(self, answer: str) -> list[Span]:
        spans: list[Span] = []
        for pattern, weight in self.patterns.items():
            new = [(match.start(), match.end(), weight) for match in re.finditer(pattern, answer, re.DOTALL)]
            spans += [span for span in new if not any(span[0] < end and start < span[1] for start, end, _ in spans)]
        return sorted(spans)


@dataclass(frozen=True, slots=True)
class LossScale:
    """A base, and strategies that are applied to every trained answer."""

    base: Base = "default"
    strategies: tuple[Strategy, ...] = ()

    def weigh(self, answer: str, query: str) -> list[Span]:
        """Spans that cover the answer from its beginning to its end, each with its weight."""
        applied = [strategy.spans(answer, query) for strategy in self.strategies]
        cuts = sorted({0, len(answer), *(edge for spans in applied for start, end, _ in spans for edge in (start, end))})
        merged: list[Span] = []
        for start, end in itertools.pairwise(cuts):
            weight = 1.0
            for spans in applied:
                weight *= next((w for first, last, w in spans if first <= start and end <= last), 1.0)
            if merged and merged[-1][2] == weight:
                merged[-1] = (merged[-1][0], end, weight)
            else:
                merged.append((start, end, weight))
        return merged


def parse_loss_scale(text: str) -> LossScale:
    """Reads a value of ``--loss_scale``.

    Raises:
        ConfigError: a name is unknown (the nearest is said), or a file cannot be read or is of another form.
    """
    first, _, rest = text.partition("+")
    base: Any = first if first in BASES else "default"
    names = (rest if first in BASES else text) if text not in BASES else ""
    parts = [names] if names.endswith(".json") and Path(names).is_file() else [name for name in names.split("+") if name]
    if first in BASES and rest == "" and "+" in text:
        raise ConfigError(f"--loss_scale {text}: nothing follows the +")
    return LossScale(base, tuple(_load(name) for name in parts if name != "base"))


def _load(name: str) -> Strategy:
    from mswift.config.fields import nearest

    path = _FOLDER / f"{name}.json" if name in STRATEGIES else Path(name).expanduser()
    if name not in STRATEGIES and not path.is_file():
        if name in BASES:
            raise ConfigError(f"--loss_scale: {name} has to stand first, such as {name}+hermes")
        near = nearest(name, [*STRATEGIES, *BASES])
        hint = f"did you mean {near}?" if near else "or the path of a JSON file"
        raise ConfigError(f"--loss_scale: {name!r} is unknown, wanted {', '.join(BASES)}, with + before any of {', '.join(STRATEGIES)}; {hint}")
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--loss_scale {path} cannot be read: {str(error).splitlines()[0]}; wanted a JSON object of weights") from error
    return _read(content, f"--loss_scale {path}")


def _read(content: Any, where: str) -> Strategy:
    nested = isinstance(content, dict) and set(content) <= {"response", "query"} and all(isinstance(part, dict) for part in content.values())
    response = content.get("response", {}) if nested else content
    if not isinstance(response, dict) or not response:
        raise ConfigError(f'{where}: wanted an object such as {{"Action:": [2.0, 2.0]}} or {{"<tool_call>.+?</tool_call>": [2.0]}}')
    weights = {key: _weights(value, f"{where}: {key!r}") for key, value in response.items()}
    query = {key: _weights(value, f"{where}: {key!r}")[0] for key, value in (content.get("query", {}) if nested else {}).items()}
    delimiters = {key: (pair[0], pair[1]) for key, pair in weights.items() if len(pair) == 2}
    patterns = {key: pair[0] for key, pair in weights.items() if len(pair) == 1}
    if delimiters and patterns:
        raise ConfigError(f"{where} mixes texts with two weights and expressions with one; put them into two files and join these with +")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}: {pattern!r} is no regular expression ({error}); mend it") from error
    return Strategy(delimiters, patterns, query)


def _weights(value: Any, where: str) -> list[float]:
    values = value if isinstance(value, list) else [value]
    good = all(isinstance(item, int | float) and not isinstance(item, bool) and item >= 0 for item in values)
    if not good or len(values) not in (1, 2):
        raise ConfigError(f"{where} has the weights {value!r}, wanted one or two numbers of at least 0")
    return [float(item) for item in values]
