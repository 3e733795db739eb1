"""Accounting: every parameter has a rule, every tensor of the checkpoint is used or dropped with a reason, nothing is left over.

A tensor that is only warned about means a model with random weights in it, so each gap is an error that lists all names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from mswift.conversion.directories import listing
from mswift.conversion.rules import AnyRule, Drop, Rule, Shape
from mswift.errors import ConversionError


def rules_by_target(rules: Iterable[AnyRule]) -> dict[str, Rule]:
    """The rules that fill a parameter, by its name."""
    found: dict[str, Rule] = {}
    for rule in rules:
        if isinstance(rule, Rule) and found.setdefault(rule.target, rule) is not rule:
            raise ConversionError(f"two rules fill {rule.target}; a family lists each parameter once")
    return found


def drops_of(rules: Iterable[AnyRule]) -> list[Drop]:
    return [rule for rule in rules if isinstance(rule, Drop)]


def gaps(rules: Sequence[AnyRule], parameters: Collection[str], tensors: Collection[str]) -> list[str]:
    """What is left over between a whole model's parameters and a whole checkpoint's tensors; empty when all is accounted for.

    Args:
        parameters: names over all pipeline stages. tensors: names in the checkpoint.
    """
    by_target = rules_by_target(rules)
    used = {source for rule in by_target.values() for source in rule.sources}
    dropped = {name for name in tensors if any(drop.matches(name) for drop in drops_of(rules))}
    return [
        *gap("parameter", set(parameters) - by_target.keys(), "without a rule"),
        *gap("rule", {name for name, rule in by_target.items() if rule.required} - set(parameters), "without a parameter"),
        *gap("tensor", used - set(tensors), "missing from the checkpoint"),
        *gap("tensor", set(tensors) - used - dropped, "that no rule reads"),
    ]


def gap(noun: str, names: Collection[str], what: str) -> list[str]:
    """``["2 tensors (a, b) that no rule reads"]``, or nothing where there are no names."""
    return [f"{listing(noun, names)} {what}"] if names else []


def fail_on(problems: Sequence[str], doing: str) -> None:
    """Raise one line for all problems.

    Raises:
        ConversionError: there is at least one.
    """
    if problems:
        raise ConversionError(f"cannot {doing}: {'; '.join(problems)}; the config, the checkpoint and the family's rules must describe one model")


def source_rows(rules: Mapping[str, Rule], shapes: Mapping[str, Shape]) -> tuple[dict[str, Shape], list[str]]:
    """The HF tensors that a whole model makes, and what is wrong with them: rows that no parameter holds, or that two hold.

    Args:
        rules: exported rules by target. shapes: whole shapes of their parameters.
    """
    sources: dict[str, Shape] = {}
    rows: dict[str, int] = {}
    spans: dict[str, list[tuple[int, int]]] = {}
    clashing, incomplete = set(), set()
    for target, rule in rules.items():
        for name, shape in rule.source_shapes(shapes[target]).items():
            if sources.setdefault(name, shape) != shape:
                clashing.add(name)
            rows[name] = shape[0] if rule.stack is None else shape[0] * rule.stack.slab_rows(shape)
        for piece in rule.pieces(rule.source_shapes(shapes[target])):
            if piece.source is not None:
                spans.setdefault(piece.source, []).append((piece.start, piece.stop))
    for name in sources:
        ordered = sorted(spans.get(name, []))
        edges = [0, *(stop for _, stop in ordered)]
        if [start for start, _ in ordered] != edges[:-1] or edges[-1] != rows[name]:
            incomplete.add(name)
    return sources, [*gap("tensor", clashing, "of two shapes"), *gap("tensor", incomplete, "whose rows are not all there once")]
