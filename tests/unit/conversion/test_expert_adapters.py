"""Adapters of experts in each form: what a program makes of the file is what was put in, and it is read again exactly."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from mswift.conversion.adapters import PREFIX, adapter_rule, lora_from_peft
from mswift.conversion.expert_adapters import (
    BEFORE_019,
    SINCE_019,
    VLLM,
    ExpertStack,
    form_of,
    gather_stacks,
    inputs_first,
    parameter_of,
    stacked_tensors,
    unstack,
)
from mswift.conversion.rules import ExpertSlot, FusedGateUp, GatedSlab, Rename, Rule, Slab
from mswift.errors import ConversionError

MODULE, EXPERTS, HIDDEN, WIDTH, RANK = "l.experts", 3, 5, 4, 2
KINDS = {"plain": {}, "transposed": {"transposed": True}, "declared": {"transposed": True, "declared": True, "woven": True}}


def rules_of(kind: str, stacked: bool) -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    for index in range(EXPERTS):
        first = ExpertSlot(MODULE, "gate_up_proj", index, EXPERTS, **KINDS[kind])
        second = ExpertSlot(MODULE, "down_proj", index, EXPERTS, **{**KINDS[kind], "woven": False})
        if stacked:
            found[f"{index}.fc1"] = GatedSlab(f"{index}.fc1", "l.gu", index, EXPERTS, first.transposed, first.woven, slot=first)
            found[f"{index}.fc2"] = Slab(f"{index}.fc2", "l.d", index, EXPERTS, second.transposed, slot=second)
        else:
            found[f"{index}.fc1"] = FusedGateUp(f"{index}.fc1", f"l.{index}.w1.weight", f"l.{index}.w3.weight", slot=first)
            found[f"{index}.fc2"] = Rename(f"{index}.fc2", f"l.{index}.w2.weight", slot=second)
    return found


def random_pairs(ranks: tuple[int, ...] = (RANK,) * EXPERTS) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for index, rank in enumerate(ranks):
        found[f"{index}.fc1"] = (torch.randn(rank, HIDDEN), torch.randn(2 * WIDTH, rank))
        found[f"{index}.fc2"] = (torch.randn(rank, WIDTH), torch.randn(HIDDEN, rank))
    return found


def shape_of(name: str) -> tuple[int, int]:
    return (2 * WIDTH, HIDDEN) if name.endswith("fc1") else (HIDDEN, WIDTH)


def delta_in_peft(a: Tensor, b: Tensor, swapped: bool) -> Tensor:
    """`ParamWrapper.get_delta_weight`, ``[experts, dim 1, dim 2]`` of the parameter; before 0.19 without the swap."""
    a, b = a.reshape(EXPERTS, -1, a.shape[-1]), b.reshape(b.shape[0], -1, EXPERTS)
    return torch.einsum("o r e, e r i -> e o i" if swapped else "o r e, e r i -> e i o", b, a)


def delta_in_vllm(a: Tensor, b: Tensor) -> Tensor:
    """As `_stack_moe_lora_weights` takes a file apart: ``[experts, out, in]``."""
    a = a.reshape(EXPERTS, -1, a.shape[-1])
    return b.reshape(b.shape[0], -1, EXPERTS).permute(2, 0, 1) @ a


def wanted_delta(kind: str, pairs: dict[str, tuple[Tensor, Tensor]], part: str) -> Tensor:
    """``[experts, out, in]`` with the rows in the order of the parameter."""
    deltas = torch.stack([pairs[f"{index}.{part}"][1] @ pairs[f"{index}.{part}"][0] for index in range(EXPERTS)])
    if KINDS[kind].get("woven") and part == "fc1":
        deltas = torch.stack((deltas[:, :WIDTH], deltas[:, WIDTH:]), dim=2).flatten(1, 2)
    return deltas


@pytest.mark.parametrize(("kind", "form"), product(KINDS, (BEFORE_019, SINCE_019, VLLM)))
def test_what_a_program_makes_of_the_file(kind: str, form: str) -> None:
    pairs = random_pairs()
    tensors = stacked_tensors(gather_stacks(rules_of(kind, stacked=False), pairs), RANK, form)
    assert set(tensors) == {f"{PREFIX}{MODULE}{inner}.lora_{factor}.weight" for inner in ("", ".base_layer") for factor in "AB"}
    for part, inner in (("fc1", ".base_layer"), ("fc2", "")):
        a, b = (tensors[f"{PREFIX}{MODULE}{inner}.lora_{factor}.weight"] for factor in "AB")
        wanted = wanted_delta(kind, pairs, part)
        if form == VLLM:
            found = delta_in_vllm(a, b)
        else:
            swapped = form == SINCE_019 and not KINDS[kind].get("declared", False)
            found = delta_in_peft(a, b, swapped)
            found = found.transpose(1, 2) if KINDS[kind].get("transposed") else found
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "form", "stacked"), product(KINDS, (BEFORE_019, SINCE_019, VLLM), (False, True)))
def test_it_is_read_again(kind: str, form: str, stacked: bool) -> None:
    """With experts of unequal rank, one without an adapter, and a tensor of another module left alone."""
    rules, pairs = rules_of(kind, stacked), random_pairs((1, 2, 2))
    del pairs["2.fc1"]
    tensors = stacked_tensors(gather_stacks(rules, pairs), 3, form) | {"other": torch.zeros(1)}
    shapes = {name: shape_of(name) for name in rules}
    single = unstack(rules.values(), tensors, shapes, targets=["gate_up_proj", "down_proj"], form=form)
    assert "other" in single
    assert not any(".base_layer." in name for name in single)
    for name, rule in rules.items():
        pair = lora_from_peft(adapter_rule(rule), single, shapes[name])
        assert pair is not None
        wanted = pairs[name][1] @ pairs[name][0] if name in pairs else torch.zeros(shapes[name])
        torch.testing.assert_close(pair[1] @ pair[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_square_matrix_is_read_by_the_version_that_wrote_it() -> None:
    slots = [ExpertSlot(MODULE, "down_proj", index, 2) for index in range(2)]
    rules = {f"{index}": Rename(f"{index}", f"l.{index}.w2.weight", slot=slot) for index, slot in enumerate(slots)}
    pairs = {name: (torch.randn(1, 4), torch.randn(4, 1)) for name in rules}
    for written, read in product((BEFORE_019, SINCE_019), repeat=2):
        tensors = stacked_tensors(gather_stacks(rules, pairs), 1, written)
        single = unstack(rules.values(), tensors, dict.fromkeys(rules, (4, 4)), targets=["down_proj"], form=read)
        for name, rule in rules.items():
            a, b = lora_from_peft(rule, single, (4, 4)) or (torch.zeros(1, 4), torch.zeros(4, 1))
            assert torch.allclose(b @ a, pairs[name][1] @ pairs[name][0]) == (written == read)


def test_forms_and_what_they_refuse() -> None:
    assert [form_of(version) for version in ("0.17.1", "0.18.2", "0.19.1", "0.21.2", "1.0")] == [BEFORE_019] * 2 + [SINCE_019] * 3
    slot = ExpertSlot(MODULE, "gate_up_proj", 0, 1, transposed=True)
    assert [inputs_first(slot, form) for form in (BEFORE_019, SINCE_019, VLLM)] == [True, False, True]
    only = [ExpertStack(slot, [(torch.randn(1, HIDDEN), torch.randn(2 * WIDTH, 1))])]
    assert set(stacked_tensors(only, 1, SINCE_019)) == {f"{PREFIX}{MODULE}.lora_{factor}.weight" for factor in "AB"}
    with pytest.raises(ConversionError, match="has an adapter on gate_up_proj alone; the form vllm-3d wants gate_up_proj and down_proj"):
        stacked_tensors(only, 1, VLLM)
    assert parameter_of(MODULE, stacked_tensors(only, 1, SINCE_019), ["experts.gate_up_proj"]) == "gate_up_proj"
    rules = rules_of("plain", stacked=False)
    tensors = stacked_tensors(gather_stacks(rules, random_pairs()), RANK, SINCE_019)
    with pytest.raises(ConversionError, match=r"l.experts.gate_up_proj has A \(6, 5\), B \(8, 6\), its 3 weights are \(8, 6\)"):
        unstack(rules.values(), tensors, dict.fromkeys(rules, (8, 6)), targets=(), form=SINCE_019)
