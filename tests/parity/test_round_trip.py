"""Hugging Face -> Megatron -> Hugging Face keeps every bit of every tensor, in whatever layout the model was held."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run
from tests.parity.cases import CASES as ALL_CASES
from tests.parity.cases import MIXTURES, options_of
from tests.parity.ranks import RoundTrip, round_trip
from tests.parity.reference import load_tensors
from tests.tiny import as_pickle, make_checkpoint, make_model

CASES = (
    ("llama/plain", "float32"),
    ("llama/plain", "bfloat16"),
    ("llama/tied", "float32"),
    ("llama/biases", "bfloat16"),
    ("llama/one-group", "float32"),
    ("qwen2/two-groups", "bfloat16"),
    ("qwen2/tied", "bfloat16"),
    ("qwen3/biases", "float32"),
    ("phi3/one-group", "bfloat16"),
    ("glm4/plain", "bfloat16"),
    ("gemma3_text/plain", "bfloat16"),
    ("olmo2/biases", "bfloat16"),
    ("cohere/head-norms", "float32"),
    ("starcoder2/plain", "bfloat16"),
    ("nemotron/biases", "float32"),
    ("mixtral/plain", "bfloat16"),
    ("qwen2_moe/normalised-some-dense", "float32"),
    ("qwen3_next/not-normalised-some-dense", "float32"),
    ("qwen3_next/dense-biases", "bfloat16"),
    ("qwen3_5_text/biases", "bfloat16"),
    ("deepseek_v3/plain", "float32"),
    ("deepseek_v2/lite", "float32"),
    ("gpt_oss/plain", "bfloat16"),
    ("granitemoe/biases", "float32"),
    ("phimoe/plain", "bfloat16"),
    ("llama4_text/plain", "bfloat16"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"tp1": (1, {}), "tp4": (4, {"tp": 4}), "tp2-pp2": (4, {"tp": 2, "pp": 2})}
AS_THEY_ARE = {
    "tp1": {case for case, _ in CASES},
    "tp4": {"qwen2/two-groups"},
    "tp2-pp2": {"llama/one-group", "phi3/one-group", "qwen2/two-groups", "deepseek_v3/plain", "deepseek_v2/lite"},
}
"""Cases whose heads the ranks can share without padding."""


@dataclass(frozen=True)
class Source:
    case: str
    dtype: str
    directory: Path
    logits: torch.Tensor


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 331, (2, 15), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, ids: torch.Tensor) -> list[Source]:
    found = []
    for index, (case, dtype) in enumerate(CASES):
        family, changes = options_of(case)
        directory = tmp_path_factory.mktemp("source")
        make_model(family, seed=index, dtype=DTYPES[dtype], **changes).save_pretrained(directory, max_shard_size="100KB")
        found.append(Source(case, dtype, directory, logits_of(directory, ids)))
    return found


def logits_of(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """By transformers, from weights copied into memory of its own: where they lie in a file changes the last bit of some products."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model(ids).logits


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_comes_back(layout: str, sources: list[Source], ids: torch.Tensor, tmp_path: Path) -> None:
    world, sizes = LAYOUTS[layout]
    trips = [RoundTrip(Run(source.directory, dtype=source.dtype, **sizes), tmp_path / str(i), "60KB") for i, source in enumerate(sources)]
    padded = run_distributed(round_trip, world, trips)[0]
    assert {source.case for source, text in zip(sources, padded, strict=True) if not text} == AS_THEY_ARE[layout]
    for source, trip in zip(sources, trips, strict=True):
        before, after = load_tensors(source.directory), load_tensors(trip.target)
        assert set(after) == set(before)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype == DTYPES[source.dtype]
            assert torch.equal(bits(after[name]), bits(tensor)), f"{source.case} {name}"
        assert len(list(trip.target.glob("*.safetensors"))) > 4
        assert torch.equal(logits_of(trip.target, ids), source.logits), source.case


def test_a_pickle_comes_back_as_safetensors(tmp_path: Path) -> None:
    family, changes = options_of("llama/tied")
    source = make_checkpoint(tmp_path / "in", family, dtype=torch.bfloat16, **changes)
    before = load_tensors(source)
    as_pickle(source)
    assert {"lm_head.weight", *before} == set(torch.load(source / "pytorch_model.bin", weights_only=True, mmap=True)), "the head is there twice"
    run_distributed(round_trip, 4, [RoundTrip(Run(source, dtype="bfloat16", tp=2, pp=2), tmp_path / "out", "60KB")])
    after = load_tensors(tmp_path / "out")
    assert set(after) == set(before)
    assert all(torch.equal(bits(after[name]), bits(tensor)) for name, tensor in before.items())
    assert not list((tmp_path / "out").glob("*.bin*"))


EVERYWHERE = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-ep2": (4, {"tp": 2, "ep": 2, "etp": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", EVERYWHERE)
def test_every_family_comes_back(layout: str, tmp_path: Path) -> None:
    world, sizes = EVERYWHERE[layout]
    families = [family for family in ALL_CASES if sizes.get("ep", 1) == 1 or family in MIXTURES]
    trips = []
    for index, family in enumerate(families):
        make_model(family, seed=index, dtype=torch.bfloat16, **ALL_CASES[family]["plain"]).save_pretrained(tmp_path / family)
        trips.append(RoundTrip(Run(tmp_path / family, dtype="bfloat16", **sizes), tmp_path / f"{family}-back", "60KB"))
    run_distributed(round_trip, world, trips, timeout=400)
    assert len(trips) >= 17
    for family, trip in zip(families, trips, strict=True):
        before, after = load_tensors(tmp_path / family), load_tensors(trip.target)
        assert set(after) == set(before), family
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(bits(after[name]), bits(tensor)), f"{family} {name}"


@pytest.mark.parametrize("size", ["1KB", "5GB"])
def test_an_export_is_a_complete_directory(size: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen2", tie_word_embeddings=True)
    run_distributed(round_trip, 2, [RoundTrip(Run(source, tp=2), tmp_path / "out", size)])
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= out
    tensors = load_tensors(source)
    if size == "5GB":
        assert {name for name in out if "safetensors" in name} == {"model.safetensors"}
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert set(index["weight_map"].values()) == {name for name in out if name.endswith(".safetensors")}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert {**before, "dtype": "float32"} == {**after, "dtype": "float32"}


def test_a_bf16_checkpoint_held_in_fp32_keeps_its_values(tmp_path: Path) -> None:
    make_model("qwen3", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    run_distributed(round_trip, 2, [RoundTrip(Run(tmp_path / "source", dtype="float32", tp=2), tmp_path / "out", "60KB")])
    before, after = load_tensors(tmp_path / "source"), load_tensors(tmp_path / "out")
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor.float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
