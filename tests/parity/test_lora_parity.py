"""An adapter is the same function here and in peft: trained and exported, merged, imported, in every layout; the base stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.tuners.targets import ADAPTABLE as EVERYTHING
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.parity.ranks import Trained, adapter_logits, first_step, train_lora
from tests.parity.reference import distance, labelled_rows, load_peft, load_tensors, logits_with
from tests.tiny import make_checkpoint, make_peft_adapter, write_rows

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "mlp_only_layers": [1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 44}
MIXTURE = {**EXPERTS, "mlp_only_layers": [1]}
MIXTURE_OF_NEXT = {**EXPERTS, "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
# three groups of heads and a base without and with biases: TP2 pads the heads; the fourth has one group for two ranks
TRAININGS: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "llama-tp1": ("llama", {}, 1, {"lora": LORA}),
    "llama-tp2-padded": ("llama", {}, 2, {"tp": 2, "lora": {**LORA, "use_rslora": True}}),
    "qwen3-tp2-one-group": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}, 2, {"tp": 2, "lora": LORA}),
    "llama-biases-tp2-pp2": ("llama", {"attention_bias": True, "mlp_bias": True}, 4, {"tp": 2, "pp": 2, "lora": LORA}),
    "qwen2-tp4-two-groups": (
        "qwen2",
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        4,
        {"tp": 4, "lora": {**LORA, "targets": ("linear_qkv",)}},
    ),
    "phi3-tp2-packed": ("phi3", {}, 2, {"tp": 2, "lora": LORA}),
    "starcoder2-pp2-no-gate": ("starcoder2", {"sliding_window": 6}, 2, {"pp": 2, "lora": LORA}),
    "gemma2-tp2-limits": ("gemma2", {"sliding_window": 6, "final_logit_softcapping": 9.0}, 2, {"tp": 2, "lora": LORA}),
    "qwen2-moe-tp2": ("qwen2_moe", MIXTURE, 2, {"tp": 2, "sequence_parallel": True, "lora": {**LORA, "targets": EVERYTHING}}),
    "mixtral-tp2-ep2-etp1": (*options_of("mixtral/plain"), 4, {"tp": 2, "ep": 2, "sequence_parallel": True, "lora": {**LORA, "targets": EVERYTHING}}),
    "qwen3-moe-ep2-etp2": ("qwen3_moe", ROUTED, 4, {"ep": 2, "etp": 2, "lora": {**LORA, "use_rslora": True}}),
    "qwen3.5-moe-tp2": ("qwen3_5_moe_text", MIXTURE_OF_NEXT, 2, {"tp": 2, "sequence_parallel": True, "lora": LORA}),
    "qwen3-next-pp2-vpp2": ("qwen3_next", MIXTURE_OF_NEXT, 2, {"pp": 2, "vpp": 2, "lora": {**LORA, "targets": EVERYTHING}}),
    "deepseek-v3-tp2": (*options_of("deepseek_v3/plain"), 2, {"tp": 2, "sequence_parallel": True, "lora": {**LORA, "targets": EVERYTHING}}),
    "deepseek-v2-pp2-ep2-lite": (*options_of("deepseek_v2/lite"), 4, {"pp": 2, "ep": 2, "lora": LORA}),
    "gpt-oss-tp2": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
        2,
        {"tp": 2, "sequence_parallel": True, "lora": {**LORA, "targets": EVERYTHING}},
    ),
    "llama4-ep2": (*options_of("llama4_text/plain"), 2, {"ep": 2, "lora": {**LORA, "targets": EVERYTHING}}),
    "granitemoe-tp2": (*options_of("granitemoe/plain"), 2, {"tp": 2, "sequence_parallel": True, "lora": {**LORA, "targets": EVERYTHING}}),
    "phimoe-ep2": (*options_of("phimoe/plain"), 2, {"ep": 2, "lora": {**LORA, "targets": EVERYTHING}}),
    "cohere-tp2-parallel": ("cohere", {"use_qk_norm": True, "logit_scale": 1.0}, 2, {"tp": 2, "lora": LORA}),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 331, (3, 20), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module", params=TRAININGS)
def trained(request: pytest.FixtureRequest, rows: Path, ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trained]]:
    """A folder with `model`, `untouched`, `adapter` and `merged`, and what the ranks say."""
    family, changes, world, options = TRAININGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    run = Run(make_checkpoint(folder / "model", family, **changes), rows, steps=4, **options)
    return folder, run_distributed(train_lora, world, run, ids, folder, timeout=120)


def logits(ranks: list[Any]) -> Tensor:
    return next(rank.logits for rank in ranks if rank.logits is not None)


def test_the_exported_adapter_computes_the_same_in_peft(trained: tuple[Path, list[Trained]], ids: Tensor) -> None:
    folder, ranks = trained
    assert ranks[0].losses[-1] < ranks[0].losses[0] - 0.1, "nothing was learnt, so nothing is compared"
    ours = logits(ranks)
    assert distance(logits_with(folder / "model", folder / "adapter", ids), ours) < 1e-4
    assert distance(logits_with(folder / "model", None, ids), ours) > 0.1


def test_the_merged_export_computes_the_same_in_transformers(trained: tuple[Path, list[Trained]], ids: Tensor) -> None:
    folder, ranks = trained
    assert distance(logits_with(folder / "merged", None, ids), logits(ranks)) < 1e-4
    base, merged = load_tensors(folder / "model"), load_tensors(folder / "merged")
    assert set(merged) == set(base)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    targets = {last_part(name) for name in [*config["target_modules"], *config.get("target_parameters", ())]}
    moved = {last_part(name) for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert moved == targets


EXPERT_NAMES = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
EXPERT_NAMES |= {"input_linear": "gate_up_proj", "output_linear": "down_proj"}


def last_part(name: str) -> str:
    """What is adapted; experts and routers of a checkpoint by the names that transformers' model has for them."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part in ("gate", "layer"):
        return "router"
    return EXPERT_NAMES.get(part, part) if ".experts." in name or part in ("input_linear", "output_linear") else part


def test_training_moves_no_base_weight_by_one_bit(trained: tuple[Path, list[Trained]]) -> None:
    folder, ranks = trained
    for rank in ranks:
        assert rank.base_before == rank.base_after
        assert len(rank.base_before) > 8
    base, untouched = load_tensors(folder / "model"), load_tensors(folder / "untouched")
    assert set(untouched) == set(base)
    assert all(torch.equal(untouched[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in base.items())


def test_an_adapter_that_is_read_again_computes_the_same(trained: tuple[Path, list[Trained]], ids: Tensor) -> None:
    """In another layout than the one that wrote it."""
    folder, ranks = trained
    size = 2 if len(ranks) == 1 else 1
    found = run_distributed(adapter_logits, size, [Run(folder / "model", adapter=folder / "adapter", tp=size)], ids)
    assert distance(found[-1][0], logits(ranks)) < 1e-4
    assert all(torch.equal(rank[0], found[0][0]) for rank in found)


# ---- adapters made by peft -----------------------------------------------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": ALL},
    "queries-and-values": {"target_modules": ["q_proj", "v_proj"]},
    "one-layer": {"target_modules": ALL, "layers_to_transform": [3]},
    "rslora-ranks": {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"k_proj": 3, "gate_proj": 7}, "alpha_pattern": {"o_proj": 5}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def peft_adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("peft")
    return [make_peft_adapter(base, folder / name, **options) for name, options in PEFT.items()]


@pytest.mark.parametrize("layout", [(1, {}), (2, {"tp": 2}), (2, {"pp": 2})], ids=["tp1", "tp2", "pp2"])
def test_an_adapter_of_peft_loads_exactly(
    layout: tuple[int, dict[str, Any]], base: Path, peft_adapters: list[Path], ids: Tensor, tmp_path: Path
) -> None:
    """And goes back to peft exactly."""
    world, sizes = layout
    copies = [tmp_path / adapter.name for adapter in peft_adapters]
    found = run_distributed(adapter_logits, world, [Run(base, adapter=adapter, **sizes) for adapter in peft_adapters], ids, copies)[-1]
    plain = logits_with(base, None, ids)
    for adapter, copy, ours in zip(peft_adapters, copies, found, strict=True):
        expected = logits_with(base, adapter, ids)
        assert distance(ours, expected) < 1e-4, adapter.name
        assert distance(plain, expected) > 0.1, adapter.name
        assert distance(logits_with(base, copy, ids), expected) < 1e-4, adapter.name


def test_an_adapter_of_peft_on_delta_nets_loads_exactly(ids: Tensor, tmp_path: Path) -> None:
    """Four modules with a factor A each become one layer, and go back to peft."""
    model = make_checkpoint(tmp_path / "model", "qwen3_5_text", full_attention_interval=2)
    adapter, copy = make_peft_adapter(model, tmp_path / "adapter"), tmp_path / "copy"
    found = run_distributed(adapter_logits, 2, [Run(model, adapter=adapter, tp=2)], ids, [copy])[-1]
    expected = logits_with(model, adapter, ids)
    assert distance(found[0], expected) < 1e-4
    assert distance(logits_with(model, copy, ids), expected) < 1e-4
    assert {"in_proj_qkv", "in_proj_a", "out_proj"} <= set(json.loads((copy / "adapter_config.json").read_text())["target_modules"])


@pytest.mark.parametrize("world", [1, 2])
def test_the_first_loss_equals_that_of_transformers_and_peft(world: int, base: Path, peft_adapters: list[Path], rows: Path, tmp_path: Path) -> None:
    found = run_distributed(first_step, world, Run(base, rows, tp=world, adapter=peft_adapters[0]), tmp_path / "gradients")
    model = load_peft(base, peft_adapters[0])
    batch = rows_for_transformers(base, rows, found[0].rows)
    assert 0 < (batch["labels"] >= 0).sum() < batch["attention_mask"].sum()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert [rank.loss for rank in found] == pytest.approx([expected] * world, rel=1e-5)


def rows_for_transformers(base: Path, rows: Path, chosen: list[int]) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    every = [json.loads(line) for line in rows.read_text(encoding="utf8").splitlines()]
    assert len(chosen) == 8
    return labelled_rows([every[row] for row in chosen], AutoTokenizer.from_pretrained(base))


def check_gradients_of_an_adapter(layout: tuple[int, dict[str, Any]], base: Path, rows: Path, folder: Path) -> None:
    """Loss, norm and gradients of the adapter in `folder` in one layout against peft's; the gradients go to `folder`."""
    world, sizes = layout
    run = Run(base, rows, adapter=folder / "adapter", max_grad_norm=0.0, **sizes)
    found = run_distributed(first_step, world, run, folder / "gradients")
    model = load_peft(base, folder / "adapter", trainable=True)
    loss = model(**rows_for_transformers(base, rows, found[0].rows)).loss
    loss.backward()
    expected = {name.removesuffix(".weight") if "magnitude" in name else name: gradient for name, gradient in peft_gradients(model).items()}
    ours = load_tensors(folder / "gradients")
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    for rank in found:
        assert rank.loss == pytest.approx(loss.item(), rel=1e-5)
        assert rank.grad_norm == pytest.approx(norm_of_fused(expected), rel=1e-4)


@pytest.mark.parametrize("layout", [(1, {}), (2, {"tp": 2}), (4, {"tp": 2, "pp": 2})], ids=["tp1", "tp2", "tp2-pp2"])
def test_the_gradients_of_an_adapter_equal_those_of_peft(
    layout: tuple[int, dict[str, Any]], base: Path, rows: Path, ids: Tensor, tmp_path: Path
) -> None:
    """From an adapter of our own: the modules of a fused layer share one A, so its gradient is the sum of theirs."""
    run_distributed(train_lora, 1, Run(base, rows, lora=LORA, steps=3), ids, tmp_path)
    check_gradients_of_an_adapter(layout, base, rows, tmp_path)


FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1", "in_proj_qkvz": "in_proj", "in_proj_ba": "in_proj"}


def fused_name(name: str) -> str:
    module = name.split(".")[-3]
    return name.replace(module, FUSED.get(module, module))


def peft_gradients(model: Any) -> dict[str, Tensor]:
    """By name in the adapter's file; those of A summed over the modules of a fused layer."""
    found = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if "lora_" in name}
    sums: dict[str, Tensor] = {}
    for name, gradient in found.items():
        if "lora_A" in name:
            sums[fused_name(name)] = sums.get(fused_name(name), 0) + gradient
    return {name: sums[fused_name(name)] if "lora_A" in name else gradient for name, gradient in found.items()}


def norm_of_fused(gradients: dict[str, Tensor]) -> float:
    """Norm over the fused adapters: an A that several modules share counts once."""
    once = {fused_name(name) if "lora_A" in name else name: gradient for name, gradient in gradients.items()}
    return float(torch.stack([gradient.norm() for gradient in once.values()]).norm())


def merge_and_write(rank: int, world: int, run: Run, target: Path) -> None:
    """For `run_distributed`."""
    open_model(run, world).export_merged(target, max_shard_size="60KB")


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_a_tied_embedding_with_an_adapter_is_merged_beside_a_head_of_its_own(sizes: dict[str, int], ids: Tensor, tmp_path: Path) -> None:
    """As peft has it: the head is the embedding without the adapter."""
    base = make_checkpoint(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    adapter = make_peft_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "o_proj"])
    run_distributed(merge_and_write, 2, Run(base, adapter=adapter, **sizes), tmp_path / "merged")
    expected = logits_with(base, adapter, ids)
    assert distance(expected, logits_with(base, None, ids)) > 0.1
    assert distance(logits_with(tmp_path / "merged", None, ids), expected) < 1e-4
    tensors = load_tensors(tmp_path / "merged")
    assert torch.equal(tensors["lm_head.weight"], load_tensors(base)["model.embed_tokens.weight"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
