"""Names of text parts, and rules with other names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mswift.conversion.file_forms import inner_name, renamed, stacked_in, with_stacks
from mswift.conversion.quantised import open_checkpoint
from mswift.conversion.rules import Drop, ExpertSlot, FusedGateUp, FusedQKV, GatedSlab, GroupedBlocks, PaddedRows, Rename, Rule, Slab
from mswift.errors import ModelError
from mswift.families import find_family, text_config


def checkpoint(folder: Path, *names: str) -> Path:
    save_file({name: torch.full((2, 3), float(index)) for index, name in enumerate(names)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("stored", "inner", "absent"),
    [
        ("model.language_model.layers.0.x", "model.layers.0.x", ("lm_head.weight", "lm_head.weight")),
        ("language_model.model.layers.0.x", "model.layers.0.x", ("lm_head.weight", "language_model.lm_head.weight")),
    ],
)
def test_a_text_part_has_the_names_that_it_has_alone(stored: str, inner: str, absent: tuple[str, str], tmp_path: Path) -> None:
    with open_checkpoint(checkpoint(tmp_path, "vision_tower.y", stored)) as reader:
        assert set(reader.names) == {"vision_tower.y", inner}
        assert inner_name(stored) == inner
        assert reader.read(inner, slice(0, 1)).tolist() in ([[0.0] * 3], [[1.0] * 3])
        assert reader.read_as(inner, (6,), slice(0, 2)).shape == (2,)
        assert [reader.stored_name(name) for name in (inner, "vision_tower.y", absent[0])] == [stored, "vision_tower.y", absent[1]]


def test_a_tensor_with_and_without_the_prefix(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"1 tensor \(model\.x\) both with and without"):
        open_checkpoint(checkpoint(tmp_path, "model.language_model.x", "model.x"))


@pytest.mark.parametrize(
    "rule",
    [
        Rename("t", "a"),
        FusedQKV("t", "a", "b", "c", 2, 3, 4),
        FusedGateUp("t", "a", "b"),
        GroupedBlocks("t", (("a", (2, 3)), ("b", (1,)))),
        PaddedRows("t", "a", 3, 4),
        Slab("t", "a", 1, 3),
        GatedSlab("t", "a", 1, 3, woven=True),
    ],
)
def test_every_rule_can_have_other_names(rule: Rule) -> None:
    other = renamed(rule, "x.{}".format)
    assert isinstance(other, Rule)
    assert other.sources == tuple(f"x.{name}" for name in rule.sources)
    assert type(other) is type(rule)
    assert renamed(other, lambda name: name.removeprefix("x.")) == rule


def test_stacks_are_found_by_kind_and_a_dropped_tensor_has_no_other_name() -> None:
    slots = [ExpertSlot(f"{layer}.experts", "gate_up_proj", 1, 3, woven=True) for layer in ("model.layers.0", "model.layers.1", "mtp.layers.0")]
    rules = [FusedGateUp(f"t{index}", f"g{index}", f"u{index}", slot=slot) for index, slot in enumerate(slots)]
    found = stacked_in(rules, {"model.layers.0.experts.gate_up_proj"})
    assert found == {"model.layers.N.experts.gate_up_proj"}
    changed = with_stacks(rules, found)
    assert [type(rule) for rule in changed] == [GatedSlab, GatedSlab, FusedGateUp]
    assert changed[0] == GatedSlab("t0", "model.layers.0.experts.gate_up_proj", 1, 3, woven=True, slot=slots[0])
    drop = Drop("a", "why")
    assert renamed(drop, str.upper) is drop


def test_the_config_of_a_larger_model_is_that_of_its_text_part() -> None:
    text = {"model_type": "qwen3_5_text", "hidden_size": 8, "tie_word_embeddings": False, "dtype": "float32"}
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text, "tie_word_embeddings": True, "vision_config": {}}
    found = text_config(whole, "here")
    assert found == {**text, "tie_word_embeddings": True, "architectures": ["Qwen3_5ForCausalLM"]}
    assert find_family(found["architectures"], "here").name == "qwen3_5_text"
    assert text_config(text, "here") == text
    with pytest.raises(ModelError, match="without a text_config"):
        text_config({**whole, "text_config": None}, "here")
    assert json.dumps(text_config({"architectures": "Qwen3_5ForConditionalGeneration"}, "here"))
