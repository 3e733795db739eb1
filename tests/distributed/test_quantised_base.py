"""QLoRA: a run on quantised frozen weights is the run on the dequantised ones; what is in memory, in a checkpoint and in an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import RankError, run_distributed
from tests.distributed.runs import Run, open_batches, open_engine, open_model, train
from tests.tiny import make_checkpoint, write_rows

NF4, NF4_PLAIN, INT8 = {"bits": 4}, {"bits": 4, "double": False}, {"bits": 8}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
EXPERTS = ("linear_qkv", "experts.linear_fc1", "experts.linear_fc2")
SHAPE = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
"""Rows of whole blocks on one rank and on two, so that both quantise alike."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("quantised")
    return Run(make_checkpoint(folder / "model", **SHAPE), write_rows(folder / "rows.jsonl"), steps=3, lora=LORA)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("quantised_experts")
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []}
    model = make_checkpoint(folder / "model", "qwen3_moe", **{**SHAPE, **shape})
    return Run(model, write_rows(folder / "rows.jsonl"), steps=3, lora={**LORA, "targets": EXPERTS})


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    return dict(engine.model.named_tensors())


def _finish(engine: Any, run: Run) -> dict[str, Any]:
    results = train(engine, open_batches(run, engine), run)
    factors = {f"{name}.{key}": value.detach().clone() for name, module in engine.model.adapters() for key, value in module.factors.items()}
    return {"losses": [result.loss for result in results], "norms": [result.grad_norm for result in results], "factors": factors}


def _both(rank: int, world: int, run: Run, bits: dict[str, Any]) -> dict[str, Any]:
    """Trained on the weights in codes; trained on a plain model that holds what the codes stand for; trained on the weights of the checkpoint."""
    from mswift.tuners.quantised import QuantSettings

    def quantised_engine() -> Any:
        from mswift.engines.megatron import MegatronEngine, OptimizerSettings

        model = open_model(run, world, deferred=True)
        model.quantise(QuantSettings(**bits))
        return MegatronEngine(model, OptimizerSettings(), seed=7, source=str(run.checkpoint))

    engine = quantised_engine()
    kept, memory = dict(engine.model.quantised), engine.model.quantised_memory
    left = {name for name, tensor in _weights(engine).items() if not tensor.is_meta}
    quantised = _finish(engine, run)
    plain = open_engine(run, world)
    originals = _weights(plain)
    errors = {}
    for name, weight in kept.items():
        values = weight.rows(0, weight.shape[0], originals[name].dtype)
        errors[name] = float((values - originals[name]).norm() / originals[name].norm())
        originals[name].copy_(values)
    dequantised = _finish(plain, run)
    ratio = sum(weight.nbytes for weight in kept.values()) / sum(originals[name].numel() for name in kept)
    codes = {name: weight.rows(0, weight.shape[0], torch.float32) for name, weight in kept.items()}
    return {"quantised": quantised, "dequantised": dequantised, "errors": errors, "bytes": ratio, "left": left, "said": memory, "codes": codes}


def check_equal(found: dict[str, Any], rtol: float = 2e-5) -> None:
    """fp32 sums in another order, over three steps of Adam, which divides by the size of gradients, small ones too."""
    ours, wanted = found["quantised"], found["dequantised"]
    torch.testing.assert_close(ours["losses"], wanted["losses"], rtol=rtol, atol=0)
    torch.testing.assert_close(ours["norms"], wanted["norms"], rtol=10 * rtol, atol=0)
    for name, factor in wanted["factors"].items():
        assert (ours["factors"][name] - factor).norm() <= 1e-3 * factor.norm(), name
    assert ours["losses"][-1] < 0.97 * ours["losses"][0]


@pytest.mark.parametrize(
    ("bits", "size", "error"), [(NF4, 0.52, 0.1), (NF4_PLAIN, 0.5625, 0.1), (INT8, 1.02, 0.01)], ids=["nf4", "nf4-plain", "int8"]
)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_is_that_of_the_dequantised_weights(base: Run, bits: dict[str, Any], size: float, error: float, tp: int) -> None:
    run = replace(base, tp=tp, sequence_parallel=tp == 2 and bits == NF4)
    for found in run_distributed(_both, tp, run, bits):
        check_equal(found)
        assert len(found["errors"]) == 8, "four linear layers in each of two blocks"
        assert all(0.1 * error < value < error for value in found["errors"].values())
        assert found["bytes"] < 1.02 * size
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in found["left"]} == {
            "word_embeddings",
            "output_layer",
            "input_layernorm",
            "pre_mlp_layernorm",
            "final_layernorm",
        }
        assert found["said"].startswith(f"8 linear layers in {'int8' if bits == INT8 else 'nf4'}: ")


@pytest.mark.parametrize("bits", [NF4_PLAIN, INT8], ids=["nf4", "int8"])
def test_ranks_quantise_as_one_process_does(base: Run, bits: dict[str, Any]) -> None:
    alone, (first, second) = run_distributed(_both, 1, base, bits)[0], run_distributed(_both, 2, replace(base, tp=2), bits)
    torch.testing.assert_close(first["quantised"]["losses"], alone["quantised"]["losses"], rtol=1e-5, atol=0)
    for name, whole in alone["codes"].items():
        if name.endswith("linear_fc2.weight"):
            assert torch.equal(torch.cat([first["codes"][name], second["codes"][name]], 1), whole)
        if name.endswith("linear_proj.weight"):
            assert first["codes"][name].shape[0] == whole.shape[0]


def test_layers_without_an_adapter_are_quantised_too(base: Run) -> None:
    run = replace(base, lora={**LORA, "targets": ("linear_qkv",)}, tp=2, sequence_parallel=True)
    for found in run_distributed(_both, 2, run, NF4):
        check_equal(found)
        assert len(found["errors"]) == 8
        assert len(found["quantised"]["factors"]) == 4


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2, "sequence_parallel": True, "etp": 2}], ids=["alone", "ep2", "etp2"])
def test_experts(mixture: Run, layout: dict[str, Any]) -> None:
    run = replace(mixture, **layout)
    for found in run_distributed(_both, 2 if layout else 1, run, NF4):
        check_equal(found)
        experts = [name for name in found["errors"] if ".experts." in name]
        assert len(experts) == 2 * 2 * (2 if "ep" in layout else 4)
        assert any(name.endswith("router.weight") for name in found["left"])


def test_recomputed_blocks_and_bf16(base: Run) -> None:
    run = replace(base, dtype="bfloat16", transformer={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})
    found = run_distributed(_both, 1, run, NF4)[0]
    torch.testing.assert_close(found["quantised"]["losses"], found["dequantised"]["losses"], rtol=2e-3, atol=0)
    assert found["quantised"]["losses"][-1] < 0.97 * found["quantised"]["losses"][0]
    assert found["bytes"] < 0.53


def _exported(rank: int, world: int, run: Run, folder: Path) -> None:
    from mswift.tuners.quantised import QuantSettings

    model = open_model(run, world, deferred=True)
    generator = torch.Generator().manual_seed(3)
    for _, module in model.adapters():
        module.lora_b.data.normal_(0, 0.1, generator=generator)
    if folder.name == "quantised":
        model.quantise(QuantSettings())
    model.export_adapter(folder / "adapter", base_model="x")
    model.export_merged(folder / "merged", max_shard_size="1GB")


def test_exports_are_those_of_the_plain_base(base: Run, tmp_path: Path) -> None:
    """The adapter as it is; merged into the weights of the checkpoint, read again, not into what the codes stand for."""
    from safetensors.torch import load_file

    for name in ("plain", "quantised"):
        run_distributed(_exported, 1, base, tmp_path / name)
    for part, file in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        wanted, found = (load_file(tmp_path / name / part / file) for name in ("plain", "quantised"))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    original = load_file(base.checkpoint / "model.safetensors")
    merged = load_file(tmp_path / "quantised/merged/model.safetensors")
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], original["model.layers.0.mlp.up_proj.weight"])


def _quantised_plainly(rank: int, world: int, run: Run) -> None:
    from mswift.tuners.quantised import QuantSettings

    open_model(run, world).quantise(QuantSettings())


@pytest.mark.parametrize("lora", [None, {**LORA, "use_dora": True}])
def test_what_has_no_adapter_or_dora_is_refused(base: Run, lora: dict[str, Any] | None) -> None:
    with pytest.raises(RankError, match="--quant_bits 4 is for LoRA without DoRA"):
        run_distributed(_quantised_plainly, 1, replace(base, lora=lora))


def _written(rank: int, world: int, run: Run, folder: Path) -> None:
    from mswift.engines.megatron_checkpoint import write_checkpoint

    write_checkpoint(open_model(run, world), folder)


def test_a_megatron_checkpoint_is_quantised_too(base: Run, tmp_path: Path) -> None:
    run_distributed(_written, 1, replace(base, lora=None), tmp_path / "megatron")
    found = run_distributed(_both, 2, replace(base, checkpoint=tmp_path / "megatron", tp=2), NF4_PLAIN)[0]
    wanted = run_distributed(_both, 2, replace(base, tp=2), NF4_PLAIN)[0]
    check_equal(found)
    assert found["quantised"]["losses"] == wanted["quantised"]["losses"]
    assert found["left"] == wanted["left"]
