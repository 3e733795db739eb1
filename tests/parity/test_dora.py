"""DoRA is the same function here and in peft: gradients, steps, exports, merges and imports, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.tuners.targets import ALL_LINEAR, EMBEDDING, HEAD, WITHOUT_DORA
from tests.distributed.harness import RankError, run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.parity.ranks import adapter_logits, train_lora
from tests.parity.reference import distance, load_tensors, logits_with
from tests.parity.test_lora_parity import check_gradients_of_an_adapter
from tests.tiny import make_checkpoint, make_peft_adapter, write_rows

DORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "use_dora": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-split-sequences": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "cp2": (2, {"cp": 2}),
}
"""Two of three groups of heads: tensor-parallel ranks have one of zeros, whose rows have no norm."""


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 331, (3, 20), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    write_rows(folder / "rows.jsonl")
    return make_checkpoint(folder / "model", **BIASES)


def check_a_run(lora: dict[str, Any], layout: str, base: Path, ids: Tensor, folder: Path) -> None:
    """A run learns, peft computes the same from its adapter, transformers from the merged model, and the base is as it was."""
    world, sizes = LAYOUTS[layout]
    run = Run(base, base.parent / "rows.jsonl", steps=4, lora={**lora, "dropout": 0.1}, **sizes)
    ranks = run_distributed(train_lora, world, run, ids, folder, timeout=120)
    logits = next(rank.logits for rank in ranks if rank.logits is not None)
    assert ranks[0].losses[-1] < ranks[0].losses[0] - 0.1
    assert distance(logits_with(base, folder / "adapter", ids), logits) < 1e-4
    assert distance(logits_with(folder / "merged", None, ids), logits) < 1e-4
    assert all(rank.base_before == rank.base_after for rank in ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_computes_the_same_in_peft_and_merged(layout: str, base: Path, ids: Tensor, tmp_path: Path) -> None:
    check_a_run(DORA, layout, base, ids, tmp_path)
    magnitudes = {name: tensor for name, tensor in load_tensors(tmp_path / "adapter").items() if name.endswith("lora_magnitude_vector")}
    weights = load_tensors(base)
    assert len(magnitudes) == 4 * 7
    for name, magnitude in magnitudes.items():
        start = weights[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")].norm(dim=1)
        assert 0 < (magnitude - start).abs().max() < 0.2, "trained, and not far from where it began"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_those_of_peft(layout: str, base: Path, ids: Tensor, tmp_path: Path) -> None:
    """From an adapter of our own: the modules of a fused layer share one A, so its gradient is the sum of theirs."""
    rows = base.parent / "rows.jsonl"
    run_distributed(train_lora, 1, Run(base, rows, lora=DORA, steps=3), ids, tmp_path)
    check_gradients_of_an_adapter(LAYOUTS[layout], base, rows, tmp_path)


ENDS = {**DORA, "targets": (*ALL_LINEAR, EMBEDDING, HEAD)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_and_head_compute_the_same_in_peft_and_merged(layout: str, base: Path, ids: Tensor, tmp_path: Path) -> None:
    """The magnitudes of an embedding are those of its columns, over the whole vocabulary."""
    check_a_run(ENDS, layout, base, ids, tmp_path)
    tensors, weights = load_tensors(tmp_path / "adapter"), load_tensors(base)
    for module, dim in (("model.embed_tokens", 0), ("lm_head", 1)):
        magnitude = tensors[f"base_model.model.{module}.lora_magnitude_vector"]
        start = weights[f"{module}.weight"].norm(dim=dim)
        assert magnitude.shape == start.shape
        assert 0 < (magnitude - start).abs().max() < 0.2, "trained, and not far from where it began"


@pytest.mark.parametrize("layout", ["one", "tp2-split-sequences", "tp2-pp2", "cp2"])
def test_gradients_of_embedding_and_head_equal_those_of_peft(layout: str, base: Path, ids: Tensor, tmp_path: Path) -> None:
    rows = base.parent / "rows.jsonl"
    run_distributed(train_lora, 1, Run(base, rows, lora=ENDS, steps=3), ids, tmp_path)
    check_gradients_of_an_adapter(LAYOUTS[layout], base, rows, tmp_path)


def test_the_embedding_of_a_tied_model(base: Path, ids: Tensor, tmp_path: Path) -> None:
    """The head stays as it was, so a merged model gets one of its own."""
    tied = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    run = Run(tied, base.parent / "rows.jsonl", steps=4, lora={**DORA, "targets": ("linear_qkv", EMBEDDING)}, tp=2, pp=2)
    ranks = run_distributed(train_lora, 4, run, ids, tmp_path, timeout=120)
    logits = next(rank.logits for rank in ranks if rank.logits is not None)
    assert ranks[0].losses[-1] < ranks[0].losses[0] - 0.1
    assert distance(logits_with(tied, tmp_path / "adapter", ids), logits) < 1e-4
    assert distance(logits_with(tmp_path / "merged", None, ids), logits) < 1e-4
    assert torch.equal(load_tensors(tmp_path / "merged")["lm_head.weight"], load_tensors(tied)["model.embed_tokens.weight"])


DENSE = tuple(kind for kind in ALL_LINEAR if kind not in WITHOUT_DORA)
MIXTURES: dict[str, tuple[str, int, dict[str, Any], bool]] = {
    "qwen2_moe-tp2": ("qwen2_moe/normalised-some-dense", 2, {"tp": 2, "sequence_parallel": True}, True),
    "deepseek_v3-ep2": ("deepseek_v3/plain", 2, {"ep": 2}, False),
    "qwen3_next-pp2": ("qwen3_next/not-normalised-some-dense", 2, {"pp": 2}, False),
    "granitemoe-ep2": ("granitemoe/plain", 2, {"ep": 2}, True),
}
"""The last: whether peft can load it. It takes gate_proj, up_proj and down_proj for routed experts in most mixtures, and has no DoRA there."""


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_it_everywhere_but_in_its_experts(name: str, base: Path, ids: Tensor, tmp_path: Path) -> None:
    """Attention, delta nets, dense layers and shared experts; with the scale of rsLoRA."""
    case, world, sizes, readable = MIXTURES[name]
    family, changes = options_of(case)
    model, adapter = make_checkpoint(tmp_path / "model", family, **changes), tmp_path / "adapter"
    run = Run(model, base.parent / "rows.jsonl", steps=4, lora={**DORA, "use_rslora": True, "targets": DENSE}, **sizes)
    ranks = run_distributed(train_lora, world, run, ids, tmp_path, timeout=120)
    logits = next(rank.logits for rank in ranks if rank.logits is not None)
    assert distance(logits_with(model, None, ids), logits) > 0.1
    assert distance(logits_with(tmp_path / "merged", None, ids), logits) < 1e-4
    assert distance(run_distributed(adapter_logits, 1, [Run(model, adapter=adapter)], ids)[0][0], logits) < 1e-4
    tensors = load_tensors(adapter)
    adapted = {key.rpartition(".lora")[0] for key in tensors}
    assert not any(".mlp.experts" in module for module in adapted)
    assert len(adapted) == len([key for key in tensors if key.endswith("magnitude_vector")]) > 8
    if readable:
        assert distance(logits_with(model, adapter, ids), logits) < 1e-4
        return
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora=True"):
        logits_with(model, adapter, ids)


PEFT: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "ranks-rslora": {"use_rslora": True, "rank_pattern": {"k_proj": 3, "gate_proj": 7}, "alpha_pattern": {"o_proj": 5}},
}


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_an_adapter_of_peft_loads_exactly_and_goes_back(layout: str, base: Path, ids: Tensor, tmp_path: Path) -> None:
    adapters = [make_peft_adapter(base, tmp_path / name, use_dora=True, **options) for name, options in PEFT.items()]
    copies = [tmp_path / f"{adapter.name}-copy" for adapter in adapters]
    world, sizes = LAYOUTS[layout]
    found = run_distributed(adapter_logits, world, [Run(base, adapter=adapter, **sizes) for adapter in adapters], ids, copies)[-1]
    plain = logits_with(base, None, ids)
    for adapter, copy, ours in zip(adapters, copies, found, strict=True):
        expected = logits_with(base, adapter, ids)
        assert distance(plain, expected) > 0.1, adapter.name
        assert distance(ours, expected) < 1e-4, adapter.name
        assert distance(logits_with(base, copy, ids), expected) < 1e-4, adapter.name


def with_dropout(rank: int, world: int, run: Run, kind: str) -> dict[str, Tensor]:
    """One layer with dropout on, and what peft says it should give for that mask, from the parts. For `run_distributed`."""
    from mswift.kernels.lora_linear import keep_mask

    module = next(module for name, module in open_model(run, world).adapters() if name.endswith(kind))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for factor in module.factors.values():
            factor.add_(torch.randn(factor.shape, generator=generator) * 0.1)
    x = torch.randn(5, 2, module.base_weight.shape[1], generator=generator)
    found = module.train()(x)  # the gate's is what is added to the base
    found = found[0] if isinstance(found, tuple) else found + x @ module.base_weight.t()
    flat = x.flatten(0, 1)
    kept = flat * keep_mask((10, flat.shape[1]), (0, flat.shape[1]), module.dropout, module.seed(), flat)
    w, delta = module.base_weight, module.scale * module.lora_b @ module.lora_a
    factor = module.lora_magnitude / (w + delta).norm(dim=1)
    wanted = flat @ w.t() + (factor - 1) * (kept @ w.t()) + factor * (kept @ delta.t())
    return {"found": found.flatten(0, 1).detach(), "wanted": wanted.detach(), "plain": (flat @ w.t()).detach(), "mask": kept == 0}


@pytest.mark.parametrize(("case", "kind"), [("llama/plain", "linear_proj.weight"), ("qwen2_moe/plain", "shared_experts.gate_weight")])
def test_dropout_takes_from_the_adapted_part_alone(case: str, kind: str, tmp_path: Path) -> None:
    """peft: the base sees the whole input; what is added for the magnitude and the factors sees what dropout has left."""
    family, changes = options_of(case)
    plain = make_checkpoint(tmp_path / "plain", family, **changes)
    said = run_distributed(with_dropout, 1, Run(plain, lora={**DORA, "dropout": 0.3, "targets": DENSE}), kind)[0]
    assert 0.2 < said["mask"].float().mean() < 0.4
    torch.testing.assert_close(said["found"], said["wanted"], rtol=1e-4, atol=1e-5)
    assert distance(said["found"], said["plain"]) > 0.1


def test_what_has_no_dora_is_refused(ids: Tensor, tmp_path: Path) -> None:
    family, changes = options_of("qwen2_moe/plain")
    mixture = make_checkpoint(tmp_path / "mixture", family, **changes)
    with pytest.raises(RankError, match="--use_dora true is not done on router; leave these out"):
        run_distributed(adapter_logits, 1, [Run(mixture, lora={**DORA, "targets": ("linear_qkv", "shared_expert_gate", "router")})], ids)


def test_the_gate_of_a_shared_expert(ids: Tensor, base: Path, tmp_path: Path) -> None:
    """An adapter of peft loads and goes back; gradients of one of ours are those of peft, with split sequences as well."""
    family, changes = options_of("qwen2_moe/plain")
    mixture = make_checkpoint(tmp_path / "mixture", family, **changes)
    adapter = make_peft_adapter(
        mixture, tmp_path / "adapter", std=0.5, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "shared_expert_gate"]
    )
    found = run_distributed(adapter_logits, 1, [Run(mixture, adapter=adapter)], ids, [tmp_path / "copy"])[0][0]
    expected = logits_with(mixture, adapter, ids)
    assert distance(logits_with(mixture, None, ids), expected) > 0.1
    assert distance(found, expected) < 1e-4
    assert distance(logits_with(mixture, tmp_path / "copy", ids), expected) < 1e-4
    rows, targets = base.parent / "rows.jsonl", ("linear_qkv", "shared_expert_gate")
    run_distributed(train_lora, 1, Run(mixture, rows, lora={**DORA, "targets": targets}, steps=3), ids, tmp_path / "own")
    check_gradients_of_an_adapter(LAYOUTS["tp2-split-sequences"], mixture, rows, tmp_path / "own")
