"""Adapters of every kind in Megatron's form: written in one layout, read in another, the same bits in peft's form before and after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mswift.tuners.targets import ADAPTABLE
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.distributed.test_resume import resume_train, train_save_train
from tests.parity.cases import options_of
from tests.parity.reference import load_tensors
from tests.tiny import make_checkpoint, make_peft_adapter, write_rows

EVERYTHING = {"rank": 3, "alpha": 5.0, "targets": ADAPTABLE}
DORA = {"rank": 3, "alpha": 5.0, "use_dora": True}
Layout = tuple[int, dict[str, Any]]


def random_adapter(rank: int, world: int, run: Run, peft: Path) -> None:
    """An adapter of which every factor is random, in peft's form. For `run_distributed`."""
    model = open_model(run, world)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, module in model.adapters():
            for factor in module.factors.values():
                factor.normal_(0.0, 0.3, generator=generator)
    model.export_adapter(peft, base_model="base")


def write(rank: int, world: int, run: Run, peft: Path, megatron: Path) -> None:
    """The adapter of a run, in both forms. For `run_distributed`."""
    from mswift.engines.megatron_checkpoint import write_adapter

    model = open_model(run, world)
    model.export_adapter(peft, base_model="base")
    write_adapter(model, megatron, base_model="base")


def read(rank: int, world: int, run: Run, megatron: Path, peft: Path) -> list[str]:
    """From Megatron's form to peft's; the names of what has an adapter here. For `run_distributed`."""
    from mswift.engines.megatron_checkpoint import read_adapter

    model = open_model(run, world)
    read_adapter(model, megatron)
    model.export_adapter(peft, base_model="base")
    return [name for name, _ in model.adapters()]


CASES: dict[str, tuple[str, dict[str, Any], Layout, Layout]] = {
    "experts-ep2-etp2-to-tp2": ("qwen3_next/not-normalised-some-dense", EVERYTHING, (4, {"ep": 2, "etp": 2}), (2, {"tp": 2})),
    "experts-tp2-to-ep2": ("qwen3_next/not-normalised-some-dense", EVERYTHING, (2, {"tp": 2}), (2, {"ep": 2})),
    "biased-experts-one-to-pp2-ep2": ("gpt_oss/one-group", EVERYTHING, (1, {}), (4, {"pp": 2, "ep": 2})),
    "dora-tp2-to-pp2-vpp2": ("llama/biases", DORA, (2, {"tp": 2}), (2, {"pp": 2, "vpp": 2})),
    "dora-ends-tp2-to-pp2": ("llama/plain", {**DORA, "targets": ("linear_qkv", "word_embeddings", "output_layer")}, (2, {"tp": 2}), (2, {"pp": 2})),
    "dora-ends-pp2-to-tp2": ("llama/plain", {**DORA, "targets": ("word_embeddings", "output_layer")}, (2, {"pp": 2}), (2, {"tp": 2})),
    "dora-one-to-tp4": ("llama/plain", {**DORA, "targets": ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")}, (1, {}), (4, {"tp": 4})),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_in_another_layout(case: str, tmp_path: Path) -> None:
    kind, lora, (world, sizes), (other_world, other_sizes) = CASES[case]
    family, changes = options_of(kind)
    base = make_checkpoint(tmp_path / "model", family, **changes)
    run_distributed(random_adapter, 1, Run(base, lora=lora), tmp_path / "random")
    run_distributed(write, world, Run(base, adapter=tmp_path / "random", **sizes), tmp_path / "peft", tmp_path / "megatron", timeout=120)
    run_distributed(read, other_world, Run(base, **other_sizes), tmp_path / "megatron", tmp_path / "back", timeout=120)
    wanted, first, found = (load_tensors(tmp_path / name) for name in ("random", "peft", "back"))
    assert set(found) == set(first) == set(wanted)
    assert all(tensor.count_nonzero() for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert torch.equal(first[name], tensor), name
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "back")]
    assert configs[0] == configs[1]
    assert configs[0]["use_dora"] == ("use_dora" in lora)


def test_the_scale_of_rslora_stays(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "model")
    run_distributed(write, 2, Run(base, lora={**EVERYTHING, "use_rslora": True}, tp=2), tmp_path / "peft", tmp_path / "megatron")
    run_distributed(read, 1, Run(base), tmp_path / "megatron", tmp_path / "back")
    first, found = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "back"))
    assert first == found
    assert (found["use_rslora"], found["r"], found["lora_alpha"]) == (True, 3, 5)
    assert found["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"])


def test_an_adapter_on_some_modules_stays_one(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "model", "qwen3")
    peft = make_peft_adapter(base, tmp_path / "peft", target_modules=r"model\.layers\.[13]\.self_attn\.(q|o)_proj|lm_head")
    run_distributed(write, 2, Run(base, tp=2, adapter=peft), tmp_path / "first", tmp_path / "megatron", timeout=120)
    names = run_distributed(read, 2, Run(base, pp=2), tmp_path / "megatron", tmp_path / "back", timeout=120)
    attention = [f"decoder.layers.{layer}.self_attention.{name}.weight" for layer in (1, 3) for name in ("linear_qkv", "linear_proj")]
    assert sorted({name for own in names for name in own}) == sorted([*attention, "output_layer.weight"])
    wanted, found = load_tensors(tmp_path / "first"), load_tensors(tmp_path / "back")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert "layers.0" not in " ".join(found)


def test_a_run_on_some_modules_is_resumed(tmp_path: Path) -> None:
    """On stages of which one has no adapter at all, and on tensor-parallel ranks."""
    base = make_checkpoint(tmp_path / "model", "qwen3", num_attention_heads=8, num_key_value_heads=4)
    peft = make_peft_adapter(base, tmp_path / "peft", target_modules=r"model\.layers\.[23]\.self_attn\.(q|o)_proj", std=0.05)
    run = Run(base, write_rows(tmp_path / "rows.jsonl"), adapter=peft)
    (tmp_path / "out").mkdir()
    went_on = run_distributed(train_save_train, 2, replace(run, pp=2), tmp_path / "out", timeout=120)[0]
    same = run_distributed(resume_train, 2, replace(run, pp=2), tmp_path / "out", timeout=120)[0]
    assert same == went_on
    other = run_distributed(resume_train, 2, replace(run, tp=2), tmp_path / "out", timeout=120)[0]
    for (loss, norm), (wanted, wanted_norm) in zip(other, went_on, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-3)
