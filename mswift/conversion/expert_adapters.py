"""Adapters of routed experts in the forms that programs load: one adapter for each expert, or one parameter's worth for all of them.

transformers' models hold the weights of all experts of a layer in one parameter ``[experts, ...]``. peft (`ParamWrapper`) has for such a
parameter one A of ``experts * r`` rows, expert by expert, and one B of ``r * experts`` columns, in which the experts of a rank lie side by side.
Two parameters of one module are wrapped one in the other: ``MODULE.base_layer`` is that of gate and up, ``MODULE`` that of down.

Which side of the matrix A lies on has changed. Before 0.19 peft put A on the first dim of a matrix and B on the second; since then B lies on
the first and A on the second, unless the module declares its matrices ``[in, out]``. (0.19.0 alone had it the wrong way round.) vLLM wants A on
the inputs always.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mswift.conversion.adapters import PREFIX, adapter_rule, peft_names
from mswift.conversion.rules import AnyRule, ExpertSlot, Rule, Shape
from mswift.errors import ConversionError

PER_EXPERT, BEFORE_019, SINCE_019, VLLM = "per-expert", "peft<0.19", "peft>=0.19", "vllm-3d"
EXPERT_FORMS = (PER_EXPERT, BEFORE_019, SINCE_019, VLLM)
INNER = ".base_layer"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def installed_form() -> str:
    """The form that the installed peft loads; that of the newest where there is none."""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return SINCE_019
    return form_of(version)


def form_of(version: str) -> str:
    """The form of a version of peft, such as ``0.18.1``."""
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return BEFORE_019 if numbers < [0, 19] else SINCE_019


def inputs_first(slot: ExpertSlot, form: str) -> bool:
    """Whether A lies on the inputs; else B does, and A on the outputs."""
    if form == VLLM:
        return True
    return slot.transposed if form == BEFORE_019 else slot.declared or not slot.transposed


@dataclass(frozen=True)
class ExpertStack:
    """The adapters of one parameter of all experts of a layer: for each expert A ``[r, in]`` and B ``[out, r]``, or None for one without.

    Args:
        slot: of any of them.
    """

    slot: ExpertSlot
    pairs: Sequence[tuple[Tensor, Tensor] | None]

    @property
    def rank(self) -> int:
        return max(pair[0].shape[0] for pair in self.pairs if pair is not None)

    @property
    def parameter(self) -> str:
        return f"{self.slot.module}.{self.slot.parameter}"

    def factors(self, rank: int, form: str) -> tuple[Tensor, Tensor]:
        """A ``[experts * rank, ...]`` and B ``[..., rank * experts]`` as `form` has them; ranks below `rank` are filled up with zeros."""
        pairs = [self._filled(pair, rank) for pair in self.pairs]
        if not inputs_first(self.slot, form):
            pairs = [(b.t(), a.t()) for a, b in pairs]
        return torch.cat([a for a, _ in pairs]).contiguous(), torch.stack([b for _, b in pairs], dim=2).flatten(1)

    def _filled(self, pair: tuple[Tensor, Tensor] | None, rank: int) -> tuple[Tensor, Tensor]:
        some_a, some_b = next(each for each in self.pairs if each is not None)
        if pair is None:
            return some_a.new_zeros(rank, some_a.shape[1]), some_b.new_zeros(some_b.shape[0], rank)
        a, b = pair
        missing = rank - a.shape[0]
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        if self.slot.woven:  # gate and up in turn
            b = b.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
        return a, b


def gather_stacks(rules: Mapping[str, Rule], fused: Mapping[str, tuple[Tensor, Tensor]]) -> list[ExpertStack]:
    """The adapters of experts among `fused` (by megatron weight), put together by parameter."""
    found: dict[tuple[str, str], ExpertStack] = {}
    for name, pair in fused.items():
        slot = rules[name].slot
        if slot is not None:
            stack = found.setdefault((slot.module, slot.parameter), ExpertStack(slot, [None] * slot.count))
            list_of_pairs = stack.pairs
            assert isinstance(list_of_pairs, list)
            list_of_pairs[slot.index] = pair
    return list(found.values())


def stacked_tensors(stacks: Iterable[ExpertStack], rank: int, form: str) -> dict[str, Tensor]:
    """What a PEFT file has for them, by name.

    Raises:
        ConversionError: vLLM's form for a module of which one parameter has no adapter.
    """
    by_module: dict[str, dict[str, ExpertStack]] = {}
    for stack in stacks:
        by_module.setdefault(stack.slot.module, {})[stack.slot.parameter] = stack
    tensors: dict[str, Tensor] = {}
    for module, parameters in by_module.items():
        if form == VLLM and len(parameters) < 2:
            raise ConversionError(f"{module} has an adapter on {', '.join(parameters)} alone; the form {VLLM} wants gate_up_proj and down_proj")
        for parameter, stack in parameters.items():
            inner = INNER if parameter == "gate_up_proj" and len(parameters) == 2 else ""
            a, b = stack.factors(rank, form)
            tensors |= {f"{PREFIX}{module}{inner}{_A}": a, f"{PREFIX}{module}{inner}{_B}": b}
    return tensors


def expert_modules(rules: Iterable[AnyRule]) -> dict[str, ExpertSlot]:
    """The modules in transformers' model that have the weights of all experts of a layer -> a slot in each."""
    return {rule.slot.module: rule.slot for rule in rules if isinstance(rule, Rule) and rule.slot is not None}


def parameter_of(module: str, tensors: Iterable[str], targets: Iterable[str]) -> str:
    """Which parameter the outer adapter of such a module is for.

    Args:
        targets: ``target_parameters`` of its config, which decide where there is no inner adapter.
    """
    names = [target.rpartition(".")[2] for target in targets]
    alone = f"{PREFIX}{module}{INNER}{_A}" not in tensors
    return "gate_up_proj" if alone and "gate_up_proj" in names and "down_proj" not in names else "down_proj"


def unstack(
    rules: Iterable[Rule], tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], *, targets: Iterable[str], form: str
) -> dict[str, Tensor]:
    """The adapters of single experts out of those of all, by the PEFT names that `adapter_rule` gives them; the others stay as they are.

    Args:
        rules: of the expert weights that are wanted. shapes: [out, in] of each, by target. targets: ``target_parameters``.
        form: which of two the file is in, where a square matrix does not show it.

    Raises:
        ConversionError: factors of another shape.
    """
    wanted, rest = list(rules), dict(tensors)
    modules = expert_modules(wanted)
    outer = {module: parameter_of(module, tensors, targets) for module in modules}
    for rule in wanted:
        assert rule.slot is not None
        inner = "" if outer[rule.slot.module] == rule.slot.parameter else INNER
        names = [f"{PREFIX}{rule.slot.module}{inner}{kind}" for kind in (_A, _B)]
        if all(name in tensors for name in names):
            pair = _expert(rule.slot, tensors[names[0]], tensors[names[1]], shapes[rule.target], form)
            rest |= _modules_of(rule, *pair, shapes[rule.target])
    return {name: tensor for name, tensor in rest.items() if not is_stacked(name, modules)}


def is_stacked(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor of a PEFT file is that of all experts of one of these modules."""
    module = name.removeprefix(PREFIX).removesuffix(_A).removesuffix(_B)
    return module.removesuffix(INNER) in modules


def _expert(slot: ExpertSlot, a: Tensor, b: Tensor, shape: Shape, form: str) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` of one expert, gate before up."""
    rank, out, width = a.shape[0] // slot.count, *shape[:2]
    if a.shape[0] % slot.count or b.shape[1] != a.shape[0] or (a.shape[1], b.shape[0]) not in ((width, out), (out, width)):
        raise ConversionError(
            f"the adapter of {slot.module}.{slot.parameter} has A {tuple(a.shape)}, B {tuple(b.shape)}, its {slot.count} weights are {(out, width)}; "
            "it is of another model: give its own --model"
        )
    straight = (a.shape[1], b.shape[0]) == (width, out) and (width != out or inputs_first(slot, form))
    one_a, one_b = a[slot.index * rank : (slot.index + 1) * rank], b.unflatten(1, (rank, slot.count))[..., slot.index]
    if not straight:
        one_a, one_b = one_b.t(), one_a.t()
    if slot.woven:
        one_b = one_b.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    return one_a.contiguous(), one_b.contiguous()


def _modules_of(rule: Rule, a: Tensor, b: Tensor, shape: Shape) -> dict[str, Tensor]:
    """Gate and up with the one A that they share, or down."""
    single = adapter_rule(rule)
    found: dict[str, Tensor] = {}
    at = 0
    for source, module_shape in single.source_shapes(shape).items():
        name_a, name_b = peft_names(source)
        found |= {name_a: a, name_b: b[at : at + module_shape[0]]}
        at += module_shape[0]
    return found
