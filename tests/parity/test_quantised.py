"""A quantised checkpoint is the model that its dequantised weights make: logits, a LoRA step and the export, in several layouts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run
from tests.parity.ranks import FirstStep, RoundTrip, adapter_logits, first_step, round_trip
from tests.parity.reference import distance, load_tensors
from tests.tiny import make_model, make_tokenizer, write_rows
from tests.unit.conversion.quantisers import quantise_checkpoint

SIZES = {"num_attention_heads": 6, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp8": ("fp8-blocks", "llama", {}),
    "fp8-experts": ("fp8-other-blocks", "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28}),
    "compressed-int4": ("compressed-int4-groups-zero-points", "qwen3", {}),
    "compressed-int8": ("compressed-int8-zero-points", "llama", {"attention_bias": True}),
    "gptq": ("gptq-activation-order", "llama", {}),
    "awq": ("awq", "qwen2", {"hidden_size": 120}),
    "nf4": ("nf4-double", "qwen3", {"tie_word_embeddings": True}),
    "mxfp4-experts": ("mxfp4", "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 96, "intermediate_size": 64}),
}
LAYOUTS = {"tp1": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "ep2": (2, {"ep": 2})}


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one model, quantised and plain, and the logits that transformers computes from the plain one in fp32."""

    quantised: Path
    plain: Path
    logits: Tensor


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 331, (2, 15), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, ids: Tensor) -> dict[str, Pair]:
    return {name: make_pair(tmp_path_factory.mktemp(name), ids, *model) for name, model in MODELS.items()}


def make_pair(folder: Path, ids: Tensor, case: str, family: str, changes: dict[str, Any]) -> Pair:
    from transformers import AutoModelForCausalLM

    make_model(family, dtype=torch.bfloat16, **SIZES, **changes).save_pretrained(folder / "plain")
    make_tokenizer(folder / "plain")
    quantise_checkpoint(folder / "plain", folder / "quantised", case)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return Pair(folder / "quantised", folder / "plain", model(ids, use_cache=False).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_dequantised_weights(layout: str, pairs: dict[str, Pair], ids: Tensor) -> None:
    world, sizes = LAYOUTS[layout]
    pairs = {name: pair for name, pair in pairs.items() if layout != "ep2" or "experts" in name}
    runs = [Run(directory, **sizes) for pair in pairs.values() for directory in (pair.quantised, pair.plain)]
    found = run_distributed(adapter_logits, world, runs, ids, timeout=300)[-1]
    for index, (name, pair) in enumerate(pairs.items()):
        ours, plain = found[2 * index], found[2 * index + 1]
        assert torch.equal(ours, plain), name
        assert distance(ours, pair.logits) < 1e-4, name


def test_an_export_is_the_plain_checkpoint(pairs: dict[str, Pair], tmp_path: Path) -> None:
    trips = [RoundTrip(Run(pair.quantised, tp=2, dtype="bfloat16"), tmp_path / name, "60KB") for name, pair in pairs.items()]
    run_distributed(round_trip, 2, trips, timeout=300)
    for name, pair in pairs.items():
        before, after = load_tensors(pair.plain), load_tensors(tmp_path / name)
        assert set(after) == set(before)
        assert all(torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in before.items()), name
        configs = [json.loads((path / "config.json").read_text()) for path in (pair.plain, tmp_path / name)]
        assert configs[0] == configs[1]
        assert "quantization_config" not in configs[1]


@pytest.mark.parametrize("name", ["fp8-experts", "nf4"])
def test_a_lora_step_is_that_of_the_plain_checkpoint(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    steps: list[FirstStep] = []
    for kind in ("quantised", "plain"):
        run = Run(getattr(pairs[name], kind), rows, lora={"rank": 4, "alpha": 8.0, "dropout": 0.0}, tp=2, sequence_parallel=True)
        steps.append(run_distributed(first_step, 2, run, tmp_path / kind, timeout=120)[0])
    assert steps[0] == steps[1]
    ours, plain = load_tensors(tmp_path / "quantised"), load_tensors(tmp_path / "plain")
    assert len(ours) > 8
    assert any(bool(tensor.any()) for tensor in ours.values())
    assert all(torch.equal(tensor, plain[key]) for key, tensor in ours.items())
