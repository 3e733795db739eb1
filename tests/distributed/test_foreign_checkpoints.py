"""Megatron checkpoints as other programs write them: either layer spec, layers in one tensor or in many, an optimizer beside the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mswift.families.te_names import te_name
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.distributed.test_megatron_checkpoint import Trip, assert_same, to_hf, to_megatron
from tests.parity.cases import options_of
from tests.tiny import make_checkpoint

CASES = ("llama/plain", "qwen3_moe/plain", "deepseek_v3/plain", "qwen3_next/plain", "gpt_oss/plain", "cohere/plain")


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, by key, through torch alone."""
    from torch.distributed import checkpoint

    entries = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries if hasattr(entry, "size")}
    checkpoint.load(tensors, storage_reader=checkpoint.FileSystemReader(folder))
    return tensors


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers that are one tensor as a tensor each."""
    found = {}
    for key, tensor in tensors.items():
        if re.match(r"decoder\.layers\.\D", key):
            found |= {key.replace("layers.", f"layers.{layer}.", 1): part.clone() for layer, part in enumerate(tensor)}
        else:
            found[key] = tensor
    return found


def together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The other way, of layers that are alike."""
    found: dict[str, torch.Tensor] = {}
    for key in tensors:
        match = re.match(r"decoder\.layers\.\d+\.(.+)", key)
        if match is None:
            found[key] = tensors[key]
        else:
            found[f"decoder.layers.{match[1]}"] = torch.stack([tensors[f"decoder.layers.{layer}.{match[1]}"] for layer in range(4)])
    return found


def as_local_spec(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of megatron-core's local spec, which writes the norms of mixtures as if they were fused, and those of latent attention as they are."""
    latent = any("linear_kv_down_proj" in key for key in tensors)
    names = {"linear_q_up_proj.layer_norm_": "q_layernorm.", "linear_kv_up_proj.layer_norm_": "kv_layernorm."}
    names |= {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."} if latent else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    found = {}
    for key, tensor in tensors.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        found[key] = tensor
    return found


def singly(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each expert, and gate and up, by themselves: what megatron-core writes with ``singleton_local_shards``."""
    found = {}
    for key, tensor in one_by_one(tensors).items():
        experts = re.fullmatch(r"(decoder\.layers\.\d+\.mlp\.experts\.experts\.)(.+)", key)
        parts = {f"{experts[1]}{number}.{experts[2]}": part for number, part in enumerate(tensor)} if experts else {key: tensor}
        for name, part in parts.items():
            halves = zip("wv", part.chunk(2)) if re.search(r"linear_fc1\.(weight|bias)$", name) else [("", part)]
            found |= {f"{name}_{letter}".rstrip("_"): half.clone() for letter, half in halves}
    return found


FORMS = [
    ("llama/plain", one_by_one),
    ("llama/plain", singly),
    ("qwen3_moe/plain", singly),
    ("deepseek_v3/plain", singly),
    ("gpt_oss/plain", singly),
    ("qwen3_moe/plain", together),
    ("qwen3_moe/plain", as_local_spec),
    ("deepseek_v3/plain", as_local_spec),
    ("gpt_oss/plain", as_local_spec),
]


def rewrite(rank: int, world: int, source: Path, target: Path, form: Any) -> int:
    """Write a checkpoint again as one of a training run, in another form; how many keys are others."""
    from torch.distributed import checkpoint

    before = read_whole(source / "release")
    after = form(before)
    beside = {f"optimizer.state.exp_avg.{key}": torch.zeros_like(tensor) for key, tensor in after.items()}
    folder = target / "iter_0000070"
    folder.mkdir(parents=True)
    checkpoint.save({**after, **beside}, storage_writer=checkpoint.FileSystemWriter(folder))
    (target / "latest_checkpointed_iteration.txt").write_text("70\n")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return len(after.keys() - before.keys())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> (Hugging Face directory, our Megatron checkpoint of it)."""
    folder = tmp_path_factory.mktemp("foreign")
    models = {case: make_checkpoint(folder / case.replace("/", "-"), options_of(case)[0], **options_of(case)[1]) for case in CASES}
    trips = [Trip(Run(source), folder / f"m-{source.name}") for source in models.values()]
    run_distributed(to_megatron, 1, trips, timeout=120)
    return {case: (source, trip.target) for (case, source), trip in zip(models.items(), trips, strict=True)}


@pytest.mark.parametrize(("case", "form"), FORMS, ids=lambda part: part if isinstance(part, str) else part.__name__)
def test_other_forms_are_read_bit_for_bit(case: str, form: Any, written: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, ours = written[case]
    assert run_distributed(rewrite, 1, ours, tmp_path / "m", form)[0] > 3
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m", pp=2), tmp_path / "back")], timeout=120)
    assert_same(source, tmp_path / "back")


def expected_keys(rank: int, world: int, checkpoint: Path) -> set[str]:
    """The keys that the Transformer Engine spec gives the tensors of a model, from the names that it gives them."""
    model = open_model(Run(checkpoint), world)
    keys = set()
    for name, _ in model.named_tensors():
        key = re.sub(r"experts\.(linear_fc[12])\.(weight|bias)\d+$", r"experts.experts.\1.\2", te_name(name, model.description))
        homogeneous = not isinstance(model.config.moe_layer_freq, list) and not model.config.linear_attention_freq
        keys.add(re.sub(r"layers\.\d+\.", "layers.", key) if homogeneous else key)
    return keys


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_has_the_keys_of_transformer_engine(case: str, written: dict[str, tuple[Path, Path]]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    _, ours = written[case]
    entries = FileSystemReader(ours / "release").read_metadata().state_dict_metadata
    tensors = {re.sub(r"(in_proj\.weight|conv1d\.weight)\..+", r"\1", key) for key, entry in entries.items() if hasattr(entry, "size")}
    assert tensors == run_distributed(expected_keys, 1, ours)[0]
    states = {re.sub(r"/shard.*|\.\d+", "", key) for key in entries if "_extra_state" in key}
    norms = {f"{key.removesuffix('weight')}_extra_state" for key in tensors if key.endswith(("layernorm.weight", "out_norm.weight"))}
    assert {re.sub(r"\.\d+", "", key) for key in norms} <= states
    assert "decoder.layers.self_attention.core_attention._extra_state" in states
    assert json.loads((ours / "mswift.json").read_text())["family"] == case.split("/")[0]
