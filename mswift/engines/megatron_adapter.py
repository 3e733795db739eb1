"""Adapters of a `MegatronModel`: read from a PEFT directory, written as one, and what is said of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mswift.conversion.adapters import (
    adapter_rule,
    column_magnitude,
    lora_from_peft,
    lora_to_peft,
    magnitude_from_peft,
    magnitude_name,
    magnitude_to_peft,
    module_of,
    unplaced_modules,
)
from mswift.conversion.collective import agree, gather_small
from mswift.conversion.coverage import rules_by_target
from mswift.conversion.expert_adapters import PER_EXPERT, VLLM, expert_modules, gather_stacks, installed_form, is_stacked, unstack
from mswift.conversion.load import gather_names
from mswift.conversion.peft_io import PeftAdapter, WrittenAdapter, read_peft, write_peft
from mswift.conversion.rules import Parts, Rule, Shape
from mswift.conversion.shards import Shard, take
from mswift.errors import ModelError, MswiftError
from mswift.families.model import base_parameters, shard_of
from mswift.log import get_logger, is_main_process
from mswift.tuners.lora import Adapter, LoraSettings
from mswift.tuners.targets import ADAPTABLE, EMBEDDING, ROUTED, ROUTER, WITHOUT_DORA, adaptable, coverage, kind_of

if TYPE_CHECKING:
    from mswift.engines.megatron_model import MegatronModel

logger = get_logger(__name__)
Pair = tuple[torch.Tensor, torch.Tensor]
_STOLEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Module names that peft takes for those of routed experts alone in a mixture (its `_MOE_TARGET_MODULE_MAPPING`)."""


def adaptable_modules(rules: Iterable[Any]) -> set[str]:
    """The megatron modules of a whole model that can have an adapter."""
    return {module for rule in rules if isinstance(rule, Rule) and rule.exported and (module := adaptable(rule.target)) is not None}


def describe_adapters(model: MegatronModel) -> str:
    """One line on what has an adapter and what has none. Collective."""
    return coverage(gather_names(module.module_name for _, module in model.adapters()), adaptable_modules(model.rules))


# ---- reading -------------------------------------------------------------------------------------------------------------------------


def load_adapter(model: MegatronModel, directory: Path, dropout: float) -> None:
    """Put a PEFT adapter into the model, exactly: separate A matrices of fused layers are stacked, the scale is kept.

    Raises:
        ModelError: the adapter was made for modules that this model does not have, or cannot have an adapter on.
    """
    peft = read_peft(directory, model.rules)
    _refuse_lost(model, directory, peft)
    _refuse_other_base(model, directory, peft)
    rules, shapes = rules_by_target(model.rules), _local_shapes(model)
    expert_rules = [rules[name] for name in shapes if rules[name].slot is not None]
    tensors = unstack(expert_rules, peft.tensors, shapes, targets=peft.target_parameters, form=peft.form)
    fused = {name: pair for name, shape in shapes.items() if (pair := lora_from_peft(adapter_rule(rules[name]), tensors, shape)) is not None}
    model.add_lora(_settings(model, fused, peft, dropout))
    for name, module in model.adapters():
        if name in fused:
            _fill(model, module, adapter_rule(rules[name]), fused[name], tensors, shapes[name])
        else:
            module.load(None, None)


def _settings(model: MegatronModel, fused: Mapping[str, Pair], peft: PeftAdapter, dropout: float) -> LoraSettings:
    """One rank for all layers of all stages, with the scale of the file; collective. Where one expert of a layer is adapted, all are."""
    largest = torch.tensor(max((a.shape[0] for a, _ in fused.values()), default=0))
    ranks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(ranks, int(largest))
    modules = gather_names(module for name in fused if (module := adaptable(name)) is not None)
    every = adaptable_modules(model.rules)
    layers = {_of_layer(module) for module in modules}
    modules |= {module for module in every if ROUTED in module and _of_layer(module) in layers}
    kinds = {kind_of(module) for module in modules}
    without = sorted(kinds & set(WITHOUT_DORA)) if peft.use_dora else []
    if without:
        raise ModelError(f"the adapter has DoRA on {', '.join(without)}, which is not supported there; merge it into its base with peft instead")
    return LoraSettings(
        rank=max(ranks),
        alpha=peft.scale * max(ranks),
        dropout=dropout,
        targets=tuple(kind for kind in ADAPTABLE if kind in kinds),
        use_dora=peft.use_dora,
        modules=None if modules == {module for module in every if kind_of(module) in kinds} else frozenset(modules),
    )


def _of_layer(module: str) -> str:
    """The name of a module of an expert without the number of the expert."""
    return re.sub(r"\.local_experts\.\d+\.", ".", module)


def _refuse_lost(model: MegatronModel, directory: Path, peft: PeftAdapter) -> None:
    """Every module of the file has a place, or the whole is refused."""
    stacks = expert_modules(model.rules)
    single = [name for name in peft.tensors if not is_stacked(name, stacks)]
    lost = sorted(unplaced_modules(model.rules, single))
    if lost:
        family = model.family.name
        raise ModelError(f"{directory}: {len(lost)} adapted modules ({lost[0]}, ...) are not in this {family} model; give its own base")
    given = {name for rule in rules_by_target(model.rules).values() if adaptable(rule.target) is None for name in rule.sources}
    lost = sorted(name for name in given if name.endswith(".weight") and f"base_model.model.{module_of(name)}.lora_A.weight" in peft.tensors)
    if lost:
        raise ModelError(f"{directory} adapts {module_of(lost[0])}, which is not supported; merge it into its base with peft instead")


def _refuse_other_base(model: MegatronModel, directory: Path, peft: PeftAdapter) -> None:
    """Tensors of the base that the file carries along are those of the model; collective."""
    rules, other = rules_by_target(model.rules), set()
    own = {source: rule for rule in rules.values() if rule.exported for source in rule.sources}
    strange = sorted(peft.base_tensors.keys() - own.keys())
    if strange:
        raise ModelError(f"{directory} carries {strange[0]}, which this {model.family.name} model does not have; give its own base")
    for name, parameter, shard in (entry for chunk in model.chunks for entry in base_parameters(chunk, model.groups)):
        carried = peft.base_tensors.get(rules[name].sources[0]) if rules[name].exported else None
        if carried is not None:
            model.ensure(parameter)
            missing = shard.whole_shape(parameter.shape)[0] - len(carried)
            same = missing >= 0 and carried.shape[1:] == parameter.shape[1:]
            whole = torch.nn.functional.pad(carried, (0, 0) * (carried.dim() - 1) + (0, missing)) if same else carried
            if not same or not torch.equal(take(whole, shard).to(parameter), parameter):
                other.add(rules[name].sources[0])
    found = sorted(gather_names(other))
    if found:
        raise ModelError(f"{directory} carries a {found[0]} that differs from that of its base; merge it into its base with peft instead")


def _local_shapes(model: MegatronModel) -> dict[str, Shape]:
    """The whole shape of every weight of this rank that can have an adapter."""
    found = (entry for chunk in model.chunks for entry in base_parameters(chunk, model.groups))
    exported = {rule.target for rule in rules_by_target(model.rules).values() if rule.exported}
    return {name: shard.whole_shape(tensor.shape) for name, tensor, shard in found if name in exported and adaptable(name) is not None}


def _fill(model: MegatronModel, module: Adapter, rule: Rule, pair: Pair, tensors: Mapping[str, torch.Tensor], shape: Shape) -> None:
    shards = [shard_of(parameter, model.groups) for parameter in (module.lora_a, module.lora_b)]
    module.load(*(take(whole, shard, parts) for whole, shard, parts in zip(pair, shards, (1, rule.parts))))
    if module.lora_magnitude is not None and module.by_columns:
        module.load_magnitude(column_magnitude(rule, tensors, shape[1]))
    elif module.lora_magnitude is not None:
        whole = magnitude_from_peft(rule, tensors, torch.full(shape[:1], torch.nan), shape[1])
        mine = take(whole, shard_of(module.lora_magnitude, model.groups), rule.parts).to(module.lora_magnitude)
        with torch.no_grad():
            module.lora_magnitude.copy_(torch.where(mine.isnan(), module.lora_magnitude, mine))


# ---- writing -------------------------------------------------------------------------------------------------------------------------


def export_adapter(model: MegatronModel, directory: Path, *, base_model: str, form: str | None, exist_ok: bool) -> None:
    """Write the adapter as a PEFT directory; every rank calls it, the main process writes (an adapter is a few MiB).

    Args:
        form: of the adapters of routed experts; None: what the installed peft loads.
    """
    assert model.lora is not None
    rules, groups = rules_by_target(model.rules), model._export_groups()
    parts: dict[str, tuple[torch.Tensor, Shard, Parts]] = {}
    for name, module in model.adapters():
        for factor, parameter in module.factors.items():
            parts[f"{name}/{factor}"] = (parameter.detach(), shard_of(parameter, model.groups), 1 if factor == "lora_a" else rules[name].parts)
    whole = gather_small(parts, groups)
    error: Exception | None = None
    if is_main_process():
        lora = model.lora
        try:
            written = _written(rules, whole, form or installed_form(), dora=lora.use_dora)
            _tell_stolen(rules, written, dora=lora.use_dora)
            write_peft(
                directory,
                written,
                base_model=base_model,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
                extra_files=model.tokenizer_files(),
                exist_ok=exist_ok,
            )
        except (OSError, MswiftError) as failure:
            error = failure
    agree(error, groups)


def _written(rules: Mapping[str, Rule], whole: Mapping[str, torch.Tensor], form: str, *, dora: bool) -> WrittenAdapter:
    """What goes into the file, from whole factors by ``WEIGHT/FACTOR``."""
    fused = {name: (whole[f"{name}/lora_a"], whole[f"{name}/lora_b"]) for name in dict.fromkeys(key.rpartition("/")[0] for key in whole)}
    stacked = {name for name in fused if rules[name].slot is not None and form != PER_EXPERT}
    for_peft = form not in (PER_EXPERT, VLLM)
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in fused.items():
        if name not in stacked:
            rule = _in_model(rules[name]) if for_peft else adapter_rule(rules[name])
            tensors |= lora_to_peft(rule, a, b)
            magnitude = whole.get(f"{name}/lora_magnitude")
            if magnitude is not None and kind_of(adaptable(name) or "") == EMBEDDING:
                tensors[magnitude_name(rule.sources[0])] = magnitude
            elif magnitude is not None:
                tensors |= magnitude_to_peft(rule, magnitude, a.shape[1])
    stacks = gather_stacks(rules, {name: fused[name] for name in stacked})
    targets = _Targets(rules, fused, for_peft and not dora)
    return WrittenAdapter(
        tensors,
        stacks,
        form,
        embeddings=[module_of(rules[name].sources[0]) for name in fused if kind_of(adaptable(name) or "") == EMBEDDING],
        target_modules=targets.modules(),
        target_parameters=[*targets.parameters(), *_shortest({s.parameter for s in stacks}, targets.every_stack, 2)] if for_peft or stacks else (),
    )


def _tell_stolen(rules: Mapping[str, Rule], written: WrittenAdapter, *, dora: bool) -> None:
    """Say it where peft would take the names of dense layers for those of routed experts, for which it has no DoRA."""
    stolen = sorted(_STOLEN & {name.rpartition(".")[2] for name in written.target_modules or ()})
    if dora and stolen and expert_modules(rules.values()):
        logger.warning(
            f"DoRA on {', '.join(stolen)}: in most mixtures peft takes these names for those of routed experts, where it has no DoRA, and does not "
            "load the adapter; mswift does, and mswift export --merge_lora true makes a whole model of it"
        )


def _in_model(rule: Rule) -> Rule:
    """The rule with the module's name in transformers' model."""
    if rule.module is None:
        return adapter_rule(rule)
    return dataclasses.replace(rule, source=f"{rule.module}.weight")  # type: ignore[call-arg]  # only renames have another


class _Targets:
    """The names by which peft finds the modules and parameters of an adapter again.

    Args:
        adapted: megatron weights with an adapter. for_peft: name by parameter what peft would not find by module.
    """

    def __init__(self, rules: Mapping[str, Rule], adapted: Collection[str], for_peft: bool) -> None:
        every = {name: rule for name, rule in rules.items() if rule.exported and adaptable(name) is not None}
        self.every_stack = {f"{rule.slot.module}.{rule.slot.parameter}" for rule in every.values() if rule.slot is not None}
        by_parameter = for_peft and bool(self.every_stack)
        self._adapted: tuple[set[str], set[str]] = (set(), set())
        self._every: tuple[set[str], set[str]] = (set(), set())
        for name, rule in every.items():
            if rule.slot is not None and for_peft:
                continue
            sources = (_in_model(rule) if for_peft else adapter_rule(rule)).sources
            for module in map(module_of, sources):
                parameter = by_parameter and (kind_of(adaptable(name) or "") == ROUTER or module.rpartition(".")[2] in _STOLEN)
                self._every[parameter].add(module)
                if name in adapted:
                    self._adapted[parameter].add(module)

    def modules(self) -> list[str]:
        return _shortest(self._adapted[0], self._every[0], 1)

    def parameters(self) -> list[str]:
        return [f"{name}.weight" for name in _shortest(self._adapted[1], self._every[1], 2)]


def _shortest(names: Collection[str], every: Collection[str], parts: int) -> list[str]:
    """The last so many parts of each name where all that end so are meant, the whole name elsewhere."""

    def end(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    left_out = {end(name) for name in every if name not in names}
    return sorted({name if end(name) in left_out else end(name) for name in names})


def needs_own_head(model: MegatronModel) -> bool:
    """Whether a merged model needs a head of its own: only its embedding, which is the head too, has an adapter. Collective."""
    return model.description.tied and EMBEDDING in gather_names(kind_of(module.module_name) for _, module in model.adapters())
