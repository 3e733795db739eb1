"""LoRA's own rules: what names mean, how adapters begin, what merging gives. megatron-core is needed, so it all runs in ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.tuners.targets import ADAPTABLE
from tests.distributed.harness import RankError, run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.parity.reference import load_tensors
from tests.tiny import make_model

QKV, FC1 = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


GROUPED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MIXED = ("linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2")
LATENT = ("linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "linear_fc1", "linear_fc2")


def _resolve(rank: int, world: int, cases: list[list[str]], own: tuple[str, ...] = MIXED) -> list[Any]:
    from mswift.errors import ConfigError
    from mswift.tuners.targets import resolve_targets

    def attempt(names: list[str]) -> Any:
        try:
            return resolve_targets(names, own)
        except ConfigError as error:
            return str(error)

    return [attempt(names) for names in cases]


def test_target_names() -> None:
    expected = {
        ("all-linear",): MIXED,
        ("in_proj_ba", "in_proj_qkvz"): ("in_proj",),
        ("out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"): ("in_proj", "out_proj"),
        ("down_proj", *QKV, "o_proj", *FC1): GROUPED,
        ("linear_fc2", "linear_qkv"): ("linear_qkv", "linear_fc2"),
        ("o_proj",): ("linear_proj",),
        (*FC1, "linear_proj"): ("linear_proj", "linear_fc1"),
        ("q_proj", "linear_qkv"): ("linear_qkv",),
    }
    assert run_distributed(_resolve, 1, [list(names) for names in expected])[0] == list(expected.values())


def test_target_names_of_latent_attention() -> None:
    """Where a model has no fused layer of queries, keys and values, q_proj is a layer of its own."""
    expected = {
        ("all-linear",): LATENT,
        ("q_proj", "kv_b_proj"): ("linear_q_proj", "linear_kv_up_proj"),
        ("kv_a_proj_with_mqa",): ("linear_kv_down_proj",),
    }
    assert run_distributed(_resolve, 1, [list(names) for names in expected], LATENT)[0] == list(expected.values())
    unknown = run_distributed(_resolve, 1, [["k_proj"]], LATENT)[0][0]
    assert unknown.startswith("--target_modules: got 'k_proj', wanted one of all-linear, q_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj")


def test_target_names_that_are_refused() -> None:
    unknown, part, other_part, mixed = run_distributed(
        _resolve, 1, [["q_projj"], ["q_proj", "v_proj"], ["up_proj", "o_proj"], ["all-linear", "lm_head"]]
    )[0]
    assert unknown.startswith("--target_modules: got 'q_projj', wanted one of all-linear, q_proj")
    assert "q_proj, v_proj is one layer with k_proj on the Megatron engine; name all of them" in part
    assert "up_proj is one layer with gate_proj" in other_part
    assert "got 'lm_head', wanted a model with a head of its own" in mixed
    assert all("\n" not in text for text in (unknown, part, other_part, mixed))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora") / "model"
    make_model("llama", attention_bias=True).save_pretrained(directory)
    return directory


LORA = {"rank": 4, "alpha": 6.0, "dropout": 0.0}


def _export_fresh(rank: int, world: int, run: Run, directory: Path) -> None:
    open_model(run, world).export_adapter(directory, base_model="base")


@pytest.fixture(scope="module")
def fresh(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    directory = tmp_path_factory.mktemp("fresh") / "adapter"
    run_distributed(_export_fresh, 1, Run(checkpoint, lora=LORA), directory)
    return load_tensors(directory)


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 4}, {"pp": 2}], ids=["tp2", "tp4", "pp2"])
def test_an_adapter_begins_alike_in_every_layout(sizes: dict[str, Any], checkpoint: Path, fresh: dict[str, Tensor], tmp_path: Path) -> None:
    """Heads are padded to 8 in two of them: the padding takes no part in the draw."""
    run_distributed(_export_fresh, math.prod(sizes.values()), Run(checkpoint, lora=LORA, **sizes), tmp_path / "adapter")
    found = load_tensors(tmp_path / "adapter")
    assert set(found) == set(fresh)
    for name, tensor in fresh.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Tensor]]:
    """A mixture to be adapted all over, and the adapter as it begins on one rank."""
    folder = tmp_path_factory.mktemp("mixture")
    kind, changes = options_of("qwen3_next/not-normalised-some-dense")
    make_model(kind, **changes).save_pretrained(folder / "model")
    run = Run(folder / "model", lora={**LORA, "targets": ADAPTABLE})
    run_distributed(_export_fresh, 1, run, folder / "adapter")
    return run, load_tensors(folder / "adapter")


@pytest.mark.parametrize(
    "sizes",
    [{"ep": 2}, {"ep": 2, "etp": 2}, {"tp": 2, "ep": 2}, {"pp": 2, "ep": 2}, {"tp": 2, "pp": 2, "etp": 2}],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_adapters_of_experts_begin_alike_in_every_layout(sizes: dict[str, int], mixture: tuple[Run, dict[str, Tensor]], tmp_path: Path) -> None:
    run, first = mixture
    run_distributed(_export_fresh, 4, replace(run, **sizes), tmp_path / "adapter", timeout=120)
    found = load_tensors(tmp_path / "adapter")
    assert set(found) == set(first)
    for name, tensor in first.items():
        assert torch.equal(found[name], tensor), name
    experts = [tensor for name, tensor in first.items() if name.endswith(("experts.lora_A.weight", "experts.base_layer.lora_A.weight"))]
    assert len(experts) == 3 * 2
    for factors in experts:  # of all experts of a layer, one below the other
        parts = factors.chunk(6)
        assert all(part.count_nonzero() == part.numel() and not torch.equal(part, other) for part, other in itertools.pairwise(parts))


def test_the_first_values_are_those_of_peft(checkpoint: Path, fresh: dict[str, Tensor], tmp_path: Path) -> None:
    """A uniform within 1/sqrt(in), B zero; layers and seeds differ, the modules of a fused layer do not."""
    assert len(fresh) == 4 * 7 * 2
    for name, tensor in fresh.items():
        if "lora_B" in name:
            assert tensor.count_nonzero() == 0
        else:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
            assert abs(tensor.mean().item()) < 0.2 * bound
    first = fresh["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(first, fresh["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"])
    assert not torch.equal(first, fresh["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"])
    assert not torch.equal(first, fresh["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"])
    run_distributed(_export_fresh, 1, Run(checkpoint, lora={**LORA, "seed": 7}), tmp_path / "other")
    assert not torch.equal(first, load_tensors(tmp_path / "other")["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])


def _merge(rank: int, world: int, run: Run) -> list[dict[str, Tensor]]:
    """Base, factors and merged weight of every adapter, filled at random; the base again afterwards."""
    model = open_model(run, world)
    generator = torch.Generator().manual_seed(3)
    found = []
    for _, module in model.adapters():
        with torch.no_grad():
            module.lora_a.copy_(torch.randn(module.lora_a.shape, generator=generator))
            module.lora_b.copy_(torch.randn(module.lora_b.shape, generator=generator))
            module.lora_b[0] = 0.0
            module.base_layer.weight[:2, 0] = -0.0
        base = module.base_layer.weight.detach().clone()
        merged = module.merged_weight()
        after = module.base_layer.weight.detach().clone()
        scale = torch.tensor(module.scale)
        found.append({"base": base, "a": module.lora_a.detach(), "b": module.lora_b.detach(), "merged": merged, "after": after, "scale": scale})
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_rounds_once_and_leaves_the_base(dtype: str, checkpoint: Path) -> None:
    layers = run_distributed(_merge, 1, Run(checkpoint, dtype=dtype, lora={**LORA, "use_rslora": True}))[0]
    assert len(layers) == 16
    for layer in layers:
        assert layer["scale"].item() == pytest.approx(6.0 / 2.0)  # alpha / sqrt(rank)
        assert torch.equal(layer["base"], layer["after"])
        assert torch.equal(layer["base"][0].view(torch.uint8), layer["merged"][0].view(torch.uint8)), "nothing was added here"
        exact = layer["base"].double() + layer["scale"].double() * layer["b"].double() @ layer["a"].double()
        assert layer["merged"].dtype == layer["base"].dtype
        if dtype == "bfloat16":
            same = (layer["merged"] == exact.bfloat16()).double().mean()
            assert same > 0.99  # a sum next to the middle of two bf16 numbers may go the other way from fp32
        torch.testing.assert_close(layer["merged"].double(), exact, atol=1e-5, rtol=2**-8 if dtype == "bfloat16" else 1e-5)


def _wrap(rank: int, world: int, run: Run) -> dict[str, Any]:
    from mswift.tuners.lora import LoraSettings

    model = open_model(run, world)
    chunk = model.chunks[0]
    ids = torch.arange(3, 20)[None]
    positions = torch.arange(ids.shape[1])[None]
    before = chunk(ids, positions, None).detach()
    wrapped = model.add_lora(LoraSettings(rank=2, alpha=4.0, targets=("linear_proj", "linear_fc1")))
    after = chunk.train()(ids, positions, None).detach()
    trained = [name for name, parameter in chunk.named_parameters() if parameter.requires_grad]
    try:
        model.add_lora(LoraSettings(targets=("linear_q",)))
    except ValueError as error:
        return {"before": before, "after": after, "wrapped": wrapped, "trained": trained, "error": str(error)}
    return {}


def test_wrapping_freezes_the_rest_and_changes_no_output(checkpoint: Path) -> None:
    found = run_distributed(_wrap, 1, Run(checkpoint))[0]
    assert found["wrapped"] == [f"decoder.layers.{i}.{name}" for i in range(4) for name in ("self_attention.linear_proj", "mlp.linear_fc1")]
    assert found["trained"] == [f"{name}.{factor}" for name in found["wrapped"] for factor in ("lora_a", "lora_b")]
    torch.testing.assert_close(found["after"], found["before"], atol=1e-5, rtol=1e-5)
    assert "no layer of this model has such a name; use all-linear" in found["error"]


def test_an_adapter_for_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    run_distributed(_export_fresh, 1, Run(checkpoint, lora=LORA), tmp_path / "adapter")
    make_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "short")
    make_model("llama", hidden_size=84).save_pretrained(tmp_path / "wide")
    with pytest.raises(RankError, match=r"ModelError: .*7 adapted modules \(model.layers.3.mlp.down_proj, .* llama model"):
        run_distributed(_export_fresh, 1, Run(tmp_path / "short", adapter=tmp_path / "adapter"), tmp_path / "x")
    with pytest.raises(RankError, match=r"ConversionError: the adapter of .* has A \(4, .*, its weight is \(84, "):
        run_distributed(_export_fresh, 1, Run(tmp_path / "wide", adapter=tmp_path / "adapter"), tmp_path / "x")
