"""Layers behind the last one that predict tokens further ahead (MTP): an export of a checkpoint with them has them, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.program import Worker
from tests.parity.cases import options_of
from tests.parity.reference import distance, load_tensors, logits_with
from tests.tiny import make_checkpoint, make_peft_adapter


def add_further_layer(directory: Path, number: int) -> int:
    """As DeepSeek-V3 writes one: a block of its own, two norms, a projection, copies of embedding and head. Returns how many tensors."""
    tensors = load_tensors(directory)
    block = {name.replace(f".{number - 1}.", f".{number}.", 1): tensor.clone() for name, tensor in tensors.items() if f"layers.{number - 1}." in name}
    hidden = tensors["model.norm.weight"].numel()
    own = {
        **{f"model.layers.{number}.{name}.weight": torch.rand(hidden) for name in ("enorm", "hnorm", "shared_head.norm")},
        f"model.layers.{number}.eh_proj.weight": torch.rand(hidden, 2 * hidden),
        f"model.layers.{number}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"model.layers.{number}.shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file({**tensors, **block, **own}, directory / "model.safetensors", metadata={"format": "pt"})
    return len(block) + len(own)


@pytest.mark.parametrize("case", ["deepseek_v3/plain", "glm4_moe/plain"])
def test_a_merged_model_has_them(case: str, tmp_path: Path) -> None:
    kind, changes = options_of(case)
    base = make_checkpoint(tmp_path / "model", kind, **changes)
    make_peft_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    before, ids = load_tensors(base), torch.randint(3, 331, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = logits_with(base, tmp_path / "adapter", ids)
    count = add_further_layer(base, 4)
    path = base / "config.json"
    config = json.loads(path.read_text())
    words = ["export", "--model", "model", "--adapters", "adapter", "--merge_lora", "true", "--load_args", "false", "--output_dir"]
    worker = Worker()
    path.write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    told = worker.run([*words, "merged"], tmp_path)
    path.write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    refused = worker.run([*words, "other"], tmp_path)
    worker.close()
    assert told.code == 0, told.err
    assert "left out" not in told.err
    source, merged = load_tensors(base), load_tensors(tmp_path / "merged")
    assert set(merged) == set(source)
    assert len(source) == len(before) + count
    assert [name for name in source.keys() - before.keys() if not torch.equal(source[name], merged[name])] == []
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert distance(logits_with(tmp_path / "merged", None, ids), expected) < 1e-4
    assert refused.code == 2
    assert f"{count} tensors (model.layers.4." in refused.err
    assert "that no rule reads" in refused.err
