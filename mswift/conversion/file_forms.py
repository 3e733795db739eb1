"""Other ways in which checkpoints write what the rules of a family name in one: the experts of a layer in two tensors, a prefix before the text part.

transformers' models hold the weights of all experts of a layer in one parameter, and read a file that does so as well as one with tensors for
each expert. A model with a vision tower keeps its text part under a prefix; here it has the names that it has alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from mswift.conversion.rules import AnyRule, Drop, FusedGateUp, FusedQKV, GatedSlab, GroupedBlocks, PaddedRows, Rename, Rule, Slab

TOWER = Drop(r"(model\.)?(visual|vision_tower|vision_model|multi_modal_projector)\..+", "the vision tower", told=True)
PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))


def inner_name(name: str) -> str:
    """What a tensor of a text part, or an adapter's of its modules, is called in the model alone."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def renamed(rule: AnyRule, to: Callable[[str], str]) -> AnyRule:
    """The rule with other names of its HF tensors."""
    match rule:
        case FusedQKV():
            return replace(rule, q=to(rule.q), k=to(rule.k), v=to(rule.v))
        case FusedGateUp():
            return replace(rule, gate=to(rule.gate), up=to(rule.up))
        case GroupedBlocks():
            return replace(rule, tensors=tuple((to(name), blocks) for name, blocks in rule.tensors))
        case Rename() | PaddedRows() | Slab():
            return replace(rule, source=to(rule.source))
        case _:
            return rule


def stacked_in(rules: Sequence[AnyRule], tensors: Collection[str]) -> frozenset[str]:
    """The stacks of experts among the tensors of a checkpoint for which the rules name a tensor for each expert; without the layers' numbers."""
    return frozenset(_unnumbered(name) for rule in rules if (name := _stack_of(rule)) is not None and name in tensors)


def with_stacks(rules: Sequence[AnyRule], stacked: Collection[str]) -> tuple[AnyRule, ...]:
    """The rules with these stacks, as `stacked_in` gives them, in the place of a tensor for each expert."""
    return tuple(_as_slab(rule) if (name := _stack_of(rule)) is not None and _unnumbered(name) in stacked else rule for rule in rules)


def _stack_of(rule: AnyRule) -> str | None:
    if not isinstance(rule, Rule) or rule.slot is None or isinstance(rule, Slab):
        return None
    return f"{rule.slot.module}.{rule.slot.parameter}"


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _as_slab(rule: AnyRule) -> Rule:
    assert isinstance(rule, Rule)
    assert rule.slot is not None
    slot = rule.slot
    shared = (rule.target, f"{slot.module}.{slot.parameter}", slot.index, slot.count, slot.transposed)
    return GatedSlab(*shared, slot.woven, slot=slot) if isinstance(rule, FusedGateUp) else Slab(*shared, slot=slot)
