"""Adapters: the fused form adds the same to every weight as the separate PEFT modules, both ways, whatever their A matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.conversion.adapters import adapted_modules, lora_from_peft, lora_to_peft, peft_names, unplaced_modules
from mswift.conversion.rules import FusedGateUp, FusedQKV, PaddedRows, Rename, Rule, TiedHead
from mswift.conversion.shards import Shard, cut_sources
from mswift.errors import ConversionError

HIDDEN = 6
RULES: dict[str, tuple[Rule, int]] = {
    "qkv": (FusedQKV("t", "l.q_proj.weight", "l.k_proj.weight", "l.v_proj.weight", 2, 3, 2), 20),
    "gate_up": (FusedGateUp("t", "l.gate_proj.weight", "l.up_proj.weight"), 10),
    "plain": (Rename("t", "l.o_proj.weight"), 7),
    "head": (PaddedRows("t", "lm_head.weight", 5, 8), 8),
}
KINDS = st.sampled_from(sorted(RULES))
RANKS = st.integers(1, 4)
Tensors = dict[str, torch.Tensor]


def delta(tensors: Tensors, source: str, rows: int) -> torch.Tensor:
    """What an adapter adds to one HF weight, before the scale."""
    name_a, name_b = peft_names(source)
    return tensors[name_b] @ tensors[name_a] if name_a in tensors else torch.zeros(rows, HIDDEN, dtype=torch.float64)


def assert_same_delta(rule: Rule, a: torch.Tensor, b: torch.Tensor, tensors: Tensors) -> None:
    shapes = rule.source_shapes((b.shape[0], HIDDEN))
    fused = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name, row, values in cut_sources(rule.pieces(shapes), [b @ a], None):
        fused[name][row : row + len(values)] = values
    for name, shape in shapes.items():
        torch.testing.assert_close(fused[name], delta(tensors, name, shape[0]), rtol=0, atol=1e-14)


def separate(rule: Rule, rows: int, ranks: list[int], shared: bool) -> Tensors:
    tensors: Tensors = {}
    one = torch.randn(ranks[0], HIDDEN, dtype=torch.float64)
    for rank, (source, shape) in zip(ranks, rule.source_shapes((rows, HIDDEN)).items()):
        name_a, name_b = peft_names(source)
        tensors[name_a] = one.clone() if shared else torch.randn(rank, HIDDEN, dtype=torch.float64)
        tensors[name_b] = torch.randn(shape[0], len(tensors[name_a]), dtype=torch.float64)
    return tensors


@given(KINDS, RANKS)
def test_fused_to_peft_and_back(kind: str, rank: int) -> None:
    rule, rows = RULES[kind]
    a, b = torch.randn(rank, HIDDEN, dtype=torch.float64), torch.randn(rows, rank, dtype=torch.float64)
    if kind == "head":
        b[5:] = 0  # vocabulary padding
    tensors = lora_to_peft(rule, a, b)
    assert adapted_modules(tensors) == {source.removesuffix(".weight") for source in rule.sources}
    assert_same_delta(rule, a, b, tensors)
    back = lora_from_peft(rule, tensors, (rows, HIDDEN))
    assert back is not None
    assert torch.equal(back[0], a)
    assert torch.equal(back[1], b)


@given(KINDS, st.lists(RANKS, min_size=3, max_size=3), st.booleans())
def test_separate_adapters_are_stacked_exactly(kind: str, ranks: list[int], shared: bool) -> None:
    rule, rows = RULES[kind]
    tensors = separate(rule, rows, ranks, shared)
    fused = lora_from_peft(rule, tensors, (rows, HIDDEN))
    assert fused is not None
    wanted = ranks[0] if shared or len(rule.sources) == 1 else sum(ranks[: len(rule.sources)])
    assert fused[0].shape == (wanted, HIDDEN)
    assert_same_delta(rule, *fused, tensors)
    assert_same_delta(rule, *fused, lora_to_peft(rule, *fused))


@given(st.sampled_from(["qkv", "gate_up"]), RANKS)
def test_stacked_adapters_come_apart_again(kind: str, rank: int) -> None:
    rule, rows = RULES[kind]
    tensors = separate(rule, rows, [rank] * 3, shared=False)
    fused = lora_from_peft(rule, tensors, (rows, HIDDEN))
    assert fused is not None
    back = lora_to_peft(rule, *fused)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_module_without_adapter_has_zero_rows() -> None:
    rule, rows = RULES["qkv"]
    tensors = separate(rule, rows, [2, 2, 2], shared=False)
    for name in peft_names("l.k_proj.weight"):
        del tensors[name]
    fused = lora_from_peft(rule, tensors, (rows, HIDDEN))
    assert fused is not None
    assert fused[0].shape == (4, HIDDEN)
    assert_same_delta(rule, *fused, tensors)
    assert lora_from_peft(rule, {}, (rows, HIDDEN)) is None


def test_an_untrained_adapter_keeps_its_rank() -> None:
    """B is zero before the first step: that is no reason to take it for stacked blocks."""
    rule, rows = RULES["qkv"]
    tensors = lora_to_peft(rule, torch.randn(3, HIDDEN), torch.zeros(rows, 3))
    assert all(tensors[name].shape[0] == 3 for name in tensors if "lora_A" in name)


@given(st.sampled_from([2, 4]), RANKS)
def test_shards_of_a_fused_adapter(size: int, rank: int) -> None:
    """B follows its weight: split like it, parts included."""
    rule, _ = RULES["gate_up"]
    gate, up = torch.randn(2 * size, rank), torch.randn(2 * size, rank)
    a = torch.randn(rank, HIDDEN)
    shards = [torch.cat(pair) for pair in zip(gate.chunk(size), up.chunk(size))]
    shapes = rule.source_shapes((4 * size, rank))
    got = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, row, values in cut_sources(rule.pieces(shapes), shards, 0, rule.parts):
        got[name][row : row + len(values)] = values
    tensors = lora_to_peft(rule, a, torch.cat([gate, up]))
    assert torch.equal(got["l.gate_proj.weight"], tensors[peft_names("l.gate_proj.weight")[1]])
    assert torch.equal(got["l.up_proj.weight"], tensors[peft_names("l.up_proj.weight")[1]])
    assert Shard(0, 1, size).row_ranges(4 * size, 2) == [(2, 4), (2 * size + 2, 2 * size + 4)]


def test_what_is_no_adapter_of_the_model() -> None:
    rule, rows = RULES["qkv"]
    tensors = separate(rule, rows, [2, 2, 2], shared=True)
    with pytest.raises(ConversionError, match=r"l.q_proj has A \(2, 6\), B \(12, 2\), its weight is \(12, 7\)"):
        lora_from_peft(rule, tensors, (rows, HIDDEN + 1))
    half = {name: tensor for name, tensor in tensors.items() if name != peft_names("l.v_proj.weight")[1]}
    with pytest.raises(ConversionError, match=r"l.v_proj has only one of A and B"):
        lora_from_peft(rule, half, (rows, HIDDEN))
    with pytest.raises(ConversionError, match=r"l.q_proj.weight is not understood"):
        adapted_modules(["l.q_proj.weight"])
    with pytest.raises(ConversionError, match="not the weight of a module"):
        lora_to_peft(Rename("t", "l.q_proj.bias"), torch.zeros(1, 2), torch.zeros(3, 1))
    with pytest.raises(ConversionError, match="tied"):
        lora_to_peft(TiedHead("t", "embed.weight", 5, 8), torch.zeros(1, 2), torch.zeros(8, 1))
    assert unplaced_modules([rule], tensors) == set()
    assert unplaced_modules([replace(RULES["plain"][0], source="x.weight")], tensors) == {"l.q_proj", "l.k_proj", "l.v_proj"}
