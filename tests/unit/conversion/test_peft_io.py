"""PEFT directories: read and written so that `peft` itself computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mswift.conversion.adapters import lora_from_peft, lora_to_peft, peft_names
from mswift.conversion.peft_io import lora_scale, read_peft, write_peft
from mswift.conversion.rules import FusedGateUp, FusedQKV, Rename, Rule
from mswift.conversion.shards import cut_sources
from mswift.errors import ConversionError, ModelError

HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 24, 20, 6, 3, 4, 37
TOKENS = torch.arange(22).reshape(2, 11) % VOCAB


def base_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def fused_layers() -> list[tuple[Rule, tuple[int, int]]]:
    found: list[tuple[Rule, tuple[int, int]]] = []
    for layer in range(2):
        of = f"model.layers.{layer}."
        q, k, v, o = (f"{of}self_attn.{name}_proj.weight" for name in "qkvo")
        gate, up, down = (f"{of}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        found += [
            (FusedQKV(f"{layer}.qkv", q, k, v, GROUPS, HEADS // GROUPS, HEAD_DIM), ((HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN)),
            (Rename(f"{layer}.proj", o), (HIDDEN, HEADS * HEAD_DIM)),
            (FusedGateUp(f"{layer}.fc1", gate, up), (2 * FFN, HIDDEN)),
            (Rename(f"{layer}.fc2", down), (HIDDEN, FFN)),
        ]
    return found


@torch.no_grad()
def logits_with_deltas(fused: list[tuple[Rule, torch.Tensor, torch.Tensor]], scale: float) -> torch.Tensor:
    """The base with ``scale * B @ A`` of each fused layer added to its HF weights."""
    model = base_model()
    weights = dict(model.named_parameters())
    for rule, a, b in fused:
        shapes = rule.source_shapes((b.shape[0], a.shape[1]))
        for name, row, values in cut_sources(rule.pieces(shapes), [scale * (b @ a)], None):
            weights[name][row : row + len(values)] += values
    return model(TOKENS).logits


@torch.no_grad()
def peft_logits(directory: Path) -> torch.Tensor:
    return peft.PeftModel.from_pretrained(base_model(), directory).eval()(TOKENS).logits


def save_with_peft(directory: Path, **settings: Any) -> None:
    """An adapter as peft itself writes it, all of it random."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "lora_dropout": 0.1} | settings)
    model = peft.get_peft_model(base_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_fused_adapter_in_peft(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(1)
    fused = [(rule, 0.3 * torch.randn(4, shape[1]), 0.3 * torch.randn(shape[0], 4)) for rule, shape in fused_layers()]
    tensors = {name: tensor for rule, a, b in fused for name, tensor in lora_to_peft(rule, a, b).items()}
    write_peft(tmp_path / "out", tensors, base_model="org/base", rank=4, alpha=8, dropout=0.05, use_rslora=rslora)
    torch.testing.assert_close(peft_logits(tmp_path / "out"), logits_with_deltas(fused, lora_scale(8, 4, rslora)), rtol=1e-4, atol=1e-4)
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.05, rslora)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert config.base_model_name_or_path == "org/base"
    adapter = read_peft(tmp_path / "out")
    assert adapter.tensors.keys() == tensors.keys()
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in tensors.items())
    assert (adapter.scale, adapter.base_model) == (lora_scale(8, 4, rslora), "org/base")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"rank_pattern": {"k_proj": 2, r"layers\.0\.mlp\.up_proj": 5}, "alpha_pattern": {"down_proj": 3, "0.self_attn.q_proj": 14}},
        {"rank_pattern": {"q_proj": 5}, "use_rslora": True, "init_lora_weights": "gaussian"},
    ],
)
def test_an_adapter_of_peft_in_the_fused_form_and_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(2)
    save_with_peft(tmp_path / "theirs", **settings)
    wanted = peft_logits(tmp_path / "theirs")
    assert (wanted - base_model()(TOKENS).logits).abs().max() > 0.05  # the adapter does something
    adapter = read_peft(tmp_path / "theirs")
    pairs = [(rule, lora_from_peft(rule, adapter.tensors, shape)) for rule, shape in fused_layers()]
    fused = [(rule, *pair) for rule, pair in pairs if pair is not None]
    torch.testing.assert_close(logits_with_deltas(fused, adapter.scale), wanted, rtol=1e-4, atol=1e-4)
    tensors = {name: tensor for rule, a, b in fused for name, tensor in lora_to_peft(rule, a, b).items()}
    write_peft(tmp_path / "ours", tensors, base_model=None, rank=adapter.rank, alpha=adapter.alpha, use_rslora=adapter.use_rslora)
    torch.testing.assert_close(peft_logits(tmp_path / "ours"), wanted, rtol=1e-4, atol=1e-4)


def test_modules_of_different_rank_get_the_largest_and_keep_the_scale(tmp_path: Path) -> None:
    tensors = {}
    for source, rank in (("a.q_proj.weight", 2), ("a.o_proj.weight", 6)):
        name_a, name_b = peft_names(source)
        tensors |= {name_a: torch.randn(rank, 5), name_b: torch.randn(4, rank)}
    for rslora in (False, True):
        write_peft(tmp_path / str(rslora), tensors, base_model=None, rank=2, alpha=3, use_rslora=rslora)
        adapter = read_peft(tmp_path / str(rslora))
        assert adapter.rank == 6
        assert adapter.scale == pytest.approx(lora_scale(3, 2, rslora), rel=1e-12)
        assert adapter.modules == {"a.q_proj", "a.o_proj"}
        name_a, name_b = peft_names("a.q_proj.weight")
        assert torch.equal(adapter.tensors[name_a][:2], tensors[name_a])
        assert not adapter.tensors[name_a][2:].any()
        assert torch.equal(adapter.tensors[name_b] @ adapter.tensors[name_a], tensors[name_b] @ tensors[name_a])
    assert json.loads((tmp_path / "False" / "adapter_config.json").read_text())["lora_alpha"] == 9


def test_nothing_is_half_written(tmp_path: Path) -> None:
    tensors = dict(zip(peft_names("a.weight"), (torch.ones(1, 2), torch.ones(3, 1))))
    with pytest.raises(ConversionError, match="No such file"):
        write_peft(tmp_path / "out", tensors, base_model=None, rank=1, alpha=1, extra_files=[tmp_path / "absent"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConversionError, match="no adapter to write"):
        write_peft(tmp_path / "out", {}, base_model=None, rank=1, alpha=1)
    (tmp_path / "tokenizer.json").write_text("tokens")
    write_peft(tmp_path / "out", tensors, base_model=None, rank=1, alpha=1, extra_files=[tmp_path / "tokenizer.json"])
    with pytest.raises(ConversionError, match="not empty"):
        write_peft(tmp_path / "out", tensors, base_model=None, rank=1, alpha=1)
    write_peft(tmp_path / "out", tensors, base_model=None, rank=1, alpha=1, exist_ok=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer.json"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bias": "all"}, 'bias="all"'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\]'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"an_idea_of_next_year": 3}, "an_idea_of_next_year=3"),
        ({"peft_type": "LOHA"}, 'peft_type="LOHA"'),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    save_with_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ConversionError, match=named) as caught:
        read_peft(tmp_path)
    assert "\n" not in str(caught.value)


def test_directories_that_are_no_adapter(tmp_path: Path) -> None:
    def error() -> str:
        with pytest.raises(ModelError) as caught:
            read_peft(tmp_path / "x")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in error()
    (tmp_path / "x").mkdir()
    assert "no adapter_config.json" in error()
    config = tmp_path / "x" / "adapter_config.json"
    config.write_text("{")
    assert "no adapter_model.safetensors and no adapter_model.bin" in error()
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(b"short")
    for text in ("{", "[]", '{"r": 3}', '{"r": 0, "lora_alpha": 1}'):
        config.write_text(text)
        assert "not the config of a LoRA adapter" in error()
    config.write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 1}')
    assert "adapter_model.safetensors is truncated or corrupt" in error()
    (tmp_path / "x" / "adapter_model.bin").write_bytes(b"short")
    assert "adapter_model.safetensors is truncated or corrupt" in error()
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    assert "adapter_model.bin is truncated or corrupt" in error()


@pytest.mark.parametrize("archive", [True, False])
def test_an_adapter_in_a_pickle_is_the_same(archive: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_with_peft(tmp_path / "x")
    expected = read_peft(tmp_path / "x")
    path = tmp_path / "x" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"), _use_new_zipfile_serialization=archive)
    path.unlink()
    with caplog.at_level("INFO", logger="mswift"):
        found = read_peft(tmp_path / "x")
    told = [record.getMessage().partition(": ")[2] for record in caplog.records if record.name.startswith("mswift")]
    assert told == ["its weights are pickles; they are read as tensors only (weights_only), and no code in them runs"]
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"adapter_model\.bin is truncated or corrupt: {'it is no whole zip' if archive else 'unexpected EOF'}"):
        read_peft(tmp_path / "x")


def test_a_rank_that_the_config_does_not_have(tmp_path: Path) -> None:
    save_with_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
    with pytest.raises(ModelError, match="not of rank 5"):
        read_peft(tmp_path)
