"""Adapters: LoRA on a fused megatron layer to and from PEFT's form, one adapter for each HF module. Whole tensors only.

LoRA on a layer with weight W [out, in] adds ``scale * B @ A`` with A [r, in] and B [out, r]. The rows of B are the rows of W, so the rule
of W says which of them belong to which HF module; A belongs to all. That way out is exact. The way in is exact too: where the modules of
one fused layer have different A, they are stacked, ``A = [A_1; ...; A_n]``, and each B_i keeps columns of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mswift.conversion.rules import AnyRule, FusedGateUp, GatedSlab, Rename, Rule, Shape, Slab
from mswift.errors import ConversionError

PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def module_of(source: str) -> str:
    """The HF module of a weight: ``model.layers.0.self_attn.q_proj.weight`` without its last part.

    Raises:
        ConversionError: not a weight.
    """
    if not source.endswith(".weight"):
        raise ConversionError(f"{source} is not the weight of a module; an adapter goes on a linear layer's weight")
    return source.removesuffix(".weight")


def adapter_rule(rule: Rule) -> Rule:
    """The rule of an adapter's rows; where a tensor holds the weights of all experts, modules are made up that stand for those of one."""
    if rule.slot is None or not isinstance(rule, Slab):
        return rule
    expert = f"{rule.slot.module}.{rule.slot.index}"
    if isinstance(rule, GatedSlab):
        return FusedGateUp(rule.target, f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight", slot=rule.slot)
    return Rename(rule.target, f"{expert}.down_proj.weight", slot=rule.slot)


def magnitude_name(source: str) -> str:
    """The name of DoRA's magnitude in a PEFT file, for the adapter of one HF weight."""
    return PREFIX + module_of(source) + _MAGNITUDE


def peft_names(source: str) -> tuple[str, str]:
    """The names of A and B in a PEFT file, for the adapter of one HF weight."""
    return PREFIX + module_of(source) + _A, PREFIX + module_of(source) + _B


def adapted_modules(tensors: Iterable[str]) -> set[str]:
    """The HF modules that a PEFT file has an adapter for.

    Raises:
        ConversionError: a name that is neither an A nor a B nor a magnitude.
    """
    modules = set()
    for name in tensors:
        if not name.startswith(PREFIX) or not name.endswith((_A, _B, _MAGNITUDE)):
            raise ConversionError(f"adapter tensor {name} is not understood; wanted {PREFIX}MODULE{_A}, ...{_B} or ...{_MAGNITUDE}")
        modules.add(name.removeprefix(PREFIX).removesuffix(_A).removesuffix(_B).removesuffix(_MAGNITUDE))
    return modules


def unplaced_modules(rules: Sequence[AnyRule], tensors: Iterable[str]) -> set[str]:
    """Adapted HF modules that no rule names: their adapters would be lost."""
    weights = {source for rule in rules if isinstance(rule, Rule) and rule.exported for source in adapter_rule(rule).sources}
    return {module for module in adapted_modules(tensors) if f"{module}.weight" not in weights}


def lora_to_peft(rule: Rule, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """One fused adapter as the adapters of its HF modules, by PEFT name.

    Args:
        a: [r, in]. b: [out, r], rows as in the whole parameter.

    Returns:
        For every module A [r, in] and B [out of the module, r]; where B has the block form of stacked adapters, only its block: rank r / n.
    """
    if not rule.exported:
        raise ConversionError(f"an adapter on {rule.target} cannot be exported: the head is tied to the embedding; leave it out of target_modules")
    shapes = rule.source_shapes((b.shape[0], a.shape[1]))
    rows = _rows_of_modules(rule, b, shapes)
    pairs = _blocks(a, list(rows.values()))
    tensors: dict[str, torch.Tensor] = {}
    for source, (a_part, b_part) in zip(rows, pairs):
        name_a, name_b = peft_names(source)
        tensors[name_a], tensors[name_b] = a_part[:, : shapes[source][1]].clone(), b_part.clone()
    return tensors


def _rows_of_modules(rule: Rule, values: torch.Tensor, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """By HF weight, its rows of a tensor whose rows are those of the whole parameter."""
    rows = {name: values.new_zeros(shape[0], *values.shape[1:]) for name, shape in shapes.items()}
    at = 0
    for piece in rule.pieces(shapes):
        if piece.source is not None:
            rows[piece.source][piece.start : piece.stop] = values[at : at + piece.rows]
        at += piece.rows
    return rows


def magnitude_to_peft(rule: Rule, magnitude: torch.Tensor, columns: int) -> dict[str, torch.Tensor]:
    """The magnitudes [out] of DoRA as those of the HF modules, by PEFT name; `columns`: of the whole weight."""
    shapes = rule.source_shapes((magnitude.shape[0], columns))
    return {magnitude_name(source): rows for source, rows in _rows_of_modules(rule, magnitude, shapes).items()}


def magnitude_from_peft(rule: Rule, tensors: Mapping[str, torch.Tensor], otherwise: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse: [out]; rows of modules without an adapter are those of `otherwise`.

    Raises:
        ConversionError: a magnitude is missing or of another shape.
    """
    shapes, found, at = rule.source_shapes((otherwise.shape[0], columns)), otherwise.clone(), 0
    for piece in rule.pieces(shapes):
        if piece.source is not None and peft_names(piece.source)[0] in tensors:
            rows = tensors.get(magnitude_name(piece.source))
            if rows is None or rows.shape != shapes[piece.source][:1]:
                got = "none" if rows is None else tuple(rows.shape)
                raise ConversionError(
                    f"the magnitude of {module_of(piece.source)} is {got}, wanted {shapes[piece.source][:1]}; copy the adapter again"
                )
            found[at : at + piece.rows] = rows[piece.start : piece.stop]
        at += piece.rows
    return found


def column_magnitude(rule: Rule, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    """The magnitudes ``[columns]`` of an embedding, of which peft has one for each column.

    Raises:
        ConversionError: they are missing or of another shape.
    """
    found = tensors.get(magnitude_name(rule.sources[0]))
    if found is None or found.shape != (columns,):
        got = "none" if found is None else tuple(found.shape)
        raise ConversionError(f"the magnitude of {module_of(rule.sources[0])} is {got}, wanted {(columns,)}; copy the adapter again")
    return found


def _blocks(a: torch.Tensor, bs: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Undo the stacking of `_stack` where every B is zero outside its own columns; otherwise A whole for each."""
    rank, remainder = divmod(a.shape[0], len(bs))
    spans = [slice(index * rank, (index + 1) * rank) for index in range(len(bs))]
    outside = sum(int(b.count_nonzero() - b[:, span].count_nonzero()) for b, span in zip(bs, spans))
    if len(bs) == 1 or remainder or outside or not any(b.count_nonzero() for b in bs):
        return [(a, b) for b in bs]
    return [(a[span], b[:, span]) for b, span in zip(bs, spans)]


def lora_from_peft(rule: Rule, tensors: Mapping[str, torch.Tensor], target_shape: Shape) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The adapters of a rule's HF modules as one fused adapter; None where no module has one.

    Args:
        tensors: of a PEFT file, by name. target_shape: [out, in] of the whole parameter.

    Returns:
        ``(a, b)``, [r, in] and [out, r]: r as in the file where all modules share one A, else the sum of their ranks. A module without
        an adapter, and padding, have zero rows in b. The scale is the file's.

    Raises:
        ConversionError: half an adapter, or one of another shape.
    """
    shapes = rule.source_shapes(target_shape)
    pairs = {source: _pair(source, tensors, shape) for source, shape in shapes.items()} if rule.exported else {}
    given = {source: pair for source, pair in pairs.items() if pair is not None}
    if not given:
        return None
    a, bs = _stack(given)
    a = torch.nn.functional.pad(a, (0, target_shape[1] - a.shape[1]))
    b = next(iter(bs.values())).new_zeros(target_shape[0], a.shape[0])
    at = 0
    for piece in rule.pieces(shapes):
        if piece.source in bs:
            b[at : at + piece.rows] = bs[piece.source][piece.start : piece.stop]
        at += piece.rows
    return a, b


def _pair(source: str, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not source.endswith(".weight"):
        return None
    name_a, name_b = peft_names(source)
    if name_a not in tensors and name_b not in tensors:
        return None
    if name_a not in tensors or name_b not in tensors:
        raise ConversionError(f"the adapter of {module_of(source)} has only one of A and B; the adapter file is incomplete")
    a, b = tensors[name_a], tensors[name_b]
    if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        got = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise ConversionError(f"the adapter of {module_of(source)} has {got}, its weight is {shape}; it is of another model: give its own --model")
    return a, b


def _stack(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One A for all, and every module's B for it."""
    first = next(iter(pairs.values()))[0]
    if all(a.shape == first.shape and torch.equal(a, first) for a, _ in pairs.values()):
        return first.clone(), {source: b for source, (_, b) in pairs.items()}
    total, start, wide = sum(a.shape[0] for a, _ in pairs.values()), 0, {}
    for source, (a, b) in pairs.items():
        wide[source] = b.new_zeros(b.shape[0], total)
        wide[source][:, start : start + a.shape[0]] = b
        start += a.shape[0]
    return torch.cat([a for a, _ in pairs.values()]), wide
