"""Adapters on routed experts, routers, embedding and head: their gradients, their forms, and those that peft makes, in every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mswift.conversion.expert_adapters import EXPERT_FORMS, installed_form
from mswift.tuners.targets import ADAPTABLE, EXPERT_LINEAR
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, losses, open_model
from tests.parity.cases import options_of
from tests.parity.ranks import adapter_logits, first_step, train_lora
from tests.parity.reference import distance, load_peft, load_tensors, logits_with
from tests.parity.test_lora_parity import norm_of_fused, peft_gradients, rows_for_transformers
from tests.tiny import make_checkpoint, make_peft_adapter, write_rows

ROOT = Path(__file__).parents[2]
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ADAPTABLE}
SPREAD_OVER = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2, "sequence_parallel": True}),
    "ep2": (2, {"ep": 2}),
    "ep2-etp2": (4, {"ep": 2, "etp": 2}),
    "tp2-ep2-etp1": (4, {"tp": 2, "ep": 2, "sequence_parallel": True}),
    "tp2-ep2-etp2": (4, {"tp": 2, "ep": 2, "etp": 2, "sequence_parallel": True}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 331, (3, 20), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def trained(ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `rows.jsonl` and an `adapter` on everything that can have one."""
    folder = tmp_path_factory.mktemp("experts")
    family, changes = options_of("qwen3_next/not-normalised-some-dense")
    make_checkpoint(folder / "model", family, **changes)
    rows = write_rows(folder / "rows.jsonl")
    run_distributed(train_lora, 1, Run(folder / "model", rows, lora=LORA, steps=3), ids, folder)
    return folder


@pytest.mark.parametrize("layout", SPREAD_OVER)
def test_gradients_equal_those_of_peft(layout: str, trained: Path, tmp_path: Path) -> None:
    """Those of every factor, and their norm, in which each counts once whichever ranks hold it."""
    world, sizes = SPREAD_OVER[layout]
    run = Run(trained / "model", trained / "rows.jsonl", adapter=trained / "adapter", max_grad_norm=0.0, **sizes)
    found = run_distributed(first_step, world, run, tmp_path / "gradients", timeout=120)
    rows = sorted({row for rank in found for row in rank.rows})
    model = load_peft(trained / "model", trained / "adapter", trainable=True)
    loss = model(**rows_for_transformers(trained / "model", trained / "rows.jsonl", rows)).loss
    loss.backward()
    expected = peft_gradients(model)
    ours = load_tensors(tmp_path / "gradients")
    assert set(ours) == set(expected)
    assert {"experts", "gate", "embed_tokens", "lm_head", "shared_expert_gate"} <= {part for name in expected for part in name.split(".")}
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    for rank in found:
        assert rank.loss == pytest.approx(loss.item(), rel=1e-5)
        assert rank.grad_norm == pytest.approx(norm_of_fused(expected), rel=1e-4)


# ---- forms ---------------------------------------------------------------------------------------------------------------------------

FORMS = {
    "mixtral": options_of("mixtral/plain"),
    "qwen3_moe": options_of("qwen3_moe/plain"),
    "deepseek_v3": options_of("deepseek_v3/plain"),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "llama4": options_of("llama4_text/plain"),
    "granitemoe": options_of("granitemoe/plain"),
}
OLD_PEFT = Path(os.environ.get("MSWIFT_OLD_PEFT", ROOT / ".peft-0.18"))
"""A folder with peft 0.18: ``make .peft-0.18/.set-up``, or ``pip install --no-deps --target FOLDER peft==0.18.1``."""
PROGRAM = """
import sys, torch, peft
from pathlib import Path
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
model = peft.PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save({"version": peft.__version__, "logits": model(torch.load(ids), use_cache=False).logits}, out)
"""


def write_forms(rank: int, world: int, run: Run, folder: Path, ids: Tensor) -> Tensor | None:
    """The adapter of `run`, of which every factor is random, in each form; the logits with it. For `run_distributed`."""
    model = open_model(run, world)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, module in model.adapters():
            for factor in module.factors.values():
                factor.normal_(0.0, 0.15, generator=generator)
    for form in EXPERT_FORMS:
        model.export_adapter(folder / form, base_model=str(run.checkpoint), form=form)
    return model.logits(ids)


@pytest.fixture(scope="module", params=FORMS)
def forms(request: pytest.FixtureRequest, ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp(request.param)
    family, changes = FORMS[request.param]
    run = Run(make_checkpoint(folder / "model", family, **changes), lora={**LORA, "targets": (*EXPERT_LINEAR, "router", "linear_proj", "linear_fc1")})
    logits = run_distributed(write_forms, 1, run, folder, ids)[0]
    assert logits is not None
    assert distance(logits, logits_with(folder / "model", None, ids)) > 0.1
    return folder, logits


def test_the_form_of_the_installed_peft(forms: tuple[Path, Tensor], ids: Tensor) -> None:
    folder, logits = forms
    assert installed_form() == "peft>=0.19"
    assert distance(logits_with(folder / "model", folder / "peft>=0.19", ids), logits) < 1e-4


def test_the_form_of_peft_before_0_19(forms: tuple[Path, Tensor], ids: Tensor) -> None:
    if not OLD_PEFT.exists():
        pytest.skip("peft 0.18 is not there; make .peft-0.18/.set-up installs it")
    folder, logits = forms
    torch.save(ids, folder / "ids.pt")
    words = [str(folder / name) for name in ("model", "peft<0.19", "ids.pt", "logits.pt")]
    environment = os.environ | {"PYTHONPATH": str(OLD_PEFT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(folder / "logits.pt")
    assert found["version"].startswith("0.18")
    assert distance(found["logits"], logits) < 1e-4


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "layout",
    [pytest.param((1, {}), id="one", marks=SLOW), pytest.param((2, {"ep": 2}), id="ep2"), pytest.param((2, {"tp": 2}), id="tp2", marks=SLOW)],
)
def test_every_form_is_read_again(layout: tuple[int, dict[str, Any]], forms: tuple[Path, Tensor], ids: Tensor) -> None:
    folder, logits = forms
    world, sizes = layout
    found = run_distributed(adapter_logits, world, [Run(folder / "model", adapter=folder / form, **sizes) for form in EXPERT_FORMS], ids)
    for form, ours in zip(EXPERT_FORMS, found[0], strict=True):
        assert distance(ours, logits) < 1e-4, form


def test_the_forms_differ_where_they_should(forms: tuple[Path, Tensor]) -> None:
    folder, _ = forms
    by_form = {form: load_tensors(folder / form) for form in EXPERT_FORMS}
    name = next(name for name in by_form["peft>=0.19"] if name.endswith("experts.base_layer.lora_A.weight"))
    count = json.loads((folder / "model" / "config.json").read_text())
    experts = next(count[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in count)
    hidden = count["hidden_size"]
    assert by_form["vllm-3d"][name].shape == (experts * 4, hidden)
    swapped = {form for form in ("peft<0.19", "peft>=0.19") if by_form[form][name].shape[1] != hidden}
    kind = folder.name.rstrip("0123456789")
    assert swapped == {"gpt_oss": set(), "llama": {"peft>=0.19"}}.get(kind, {"peft<0.19"})
    assert not any(".base_layer." in key for key in by_form["per-expert"])
    for form in ("peft<0.19", "peft>=0.19"):
        config = json.loads((folder / form / "adapter_config.json").read_text())
        assert {"experts.gate_up_proj", "experts.down_proj"} <= set(config["target_parameters"])
        assert config["lora_dropout"] == 0.0


# ---- adapters made by peft -----------------------------------------------------------------------------------------------------------

EP2_TP2 = {"tp": 2, "ep": 2}


def per_expert(base: Path, directory: Path, names: tuple[str, str, str, str], count: int) -> Path:
    """An adapter as peft made it with transformers 4: each projection of each expert has an A of its own, with ranks and scales by pattern.

    Args:
        names: module of the experts below a layer, and their gate, up and down projections.
    """
    generator, tensors = torch.Generator().manual_seed(3), {}
    weights = load_tensors(base)
    module, gate, up, down = names
    for layer in range(4):
        for expert in range(count):
            for name in (gate, up, down):
                path = f"model.layers.{layer}.{module}.{expert}.{name}"
                rows, columns = weights[f"{path}.weight"].shape
                tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(3, columns, generator=generator) * 0.2
                tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, 3, generator=generator) * 0.2
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": [gate, up, down], "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("kind", "module", "gate", "up", "down"),
    [
        ("mixtral/plain", "block_sparse_moe.experts", "w1", "w3", "w2"),
        ("qwen3_moe/plain", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ],
)
def test_every_expert_with_factors_of_its_own(kind: str, module: str, gate: str, up: str, down: str, ids: Tensor, tmp_path: Path) -> None:
    """Gate and up have different A: they are stacked, and come apart again."""
    family, changes = options_of(kind)
    base = make_checkpoint(tmp_path / "model", family, **changes)
    adapter, copy = per_expert(base, tmp_path / "adapter", (module, gate, up, down), 6), tmp_path / "copy"
    expected = logits_with(base, adapter, ids)
    assert distance(expected, logits_with(base, None, ids)) > 0.1
    runs = [Run(base, adapter=adapter, **EP2_TP2)]
    found = run_distributed(adapter_logits, 4, runs, ids, [copy], timeout=120)
    assert distance(found[0][0], expected) < 1e-4
    assert distance(logits_with(base, copy, ids), expected) < 1e-4


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("qwen3_moe/plain", {"target_modules": "all-linear"}),
    "some-layers": ("qwen3_next/plain", {"target_modules": ["q_proj", "o_proj", "in_proj_ba", "shared_expert_gate"], "layers_to_transform": [1, 3]}),
    "one-parameter": ("gpt_oss/no-biases", {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "mlp.router.weight"]}),
    "other-parameter": ("llama4_text/plain", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "embedding-and-head": ("gemma2/no-limits", {"target_modules": ["embed_tokens", "k_proj"], "rank_pattern": {"embed_tokens": 7}}),
    "head": ("deepseek_v2/lite", {"target_modules": ["lm_head", "kv_a_proj_with_mqa"], "use_rslora": True, "alpha_pattern": {"lm_head": 3}}),
    "patterns": (
        "phimoe/plain",
        {
            "target_modules": ["q_proj", "v_proj", "lm_head"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
            "rank_pattern": {"experts.gate_up_proj": 6, "router": 2},
            "alpha_pattern": {"experts.down_proj": 11},
        },
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_an_adapter_of_peft_loads_exactly_and_goes_back(case: str, ids: Tensor, tmp_path: Path) -> None:
    kind, options = PEFT[case]
    family, changes = options_of(kind)
    base = make_checkpoint(tmp_path / "model", family, **changes)
    adapter, copy = make_peft_adapter(base, tmp_path / "adapter", **options), tmp_path / "copy"
    expected = logits_with(base, adapter, ids)
    assert distance(expected, logits_with(base, None, ids)) > 0.05
    sizes = {"ep": 2} if family not in ("gemma2",) else {"tp": 2}
    found = run_distributed(adapter_logits, 2, [Run(base, adapter=adapter, **sizes)], ids, [copy], timeout=120)
    assert distance(found[0][0], expected) < 1e-4
    assert distance(logits_with(base, copy, ids), expected) < 1e-4


def test_an_adapter_on_some_experts_leaves_the_others(ids: Tensor, tmp_path: Path) -> None:
    """As one with zeros for the rest, which peft reads as well."""
    family, changes = options_of("qwen3_moe/plain")
    base = make_checkpoint(tmp_path / "model", family, **changes)
    zeros = per_expert(base, tmp_path / "zeros", ("mlp.experts", "gate_proj", "up_proj", "down_proj"), 6)
    tensors = load_tensors(zeros)
    left_out = {name for name in tensors if ".experts.2." in name or ".experts.5.down_proj." in name or ".layers.1." in name}
    tensors |= {name: torch.zeros_like(tensors[name]) for name in left_out if "lora_B" in name}
    save_file(tensors, zeros / "adapter_model.safetensors")
    some = tmp_path / "some"
    some.mkdir()
    (some / "adapter_config.json").write_bytes((zeros / "adapter_config.json").read_bytes())
    save_file({name: tensor for name, tensor in tensors.items() if name not in left_out}, some / "adapter_model.safetensors")
    expected = logits_with(base, zeros, ids)
    copy = tmp_path / "copy"
    found = run_distributed(adapter_logits, 2, [Run(base, adapter=some, ep=2)], ids, [copy])
    assert distance(found[0][0], expected) < 1e-4
    assert distance(logits_with(base, copy, ids), expected) < 1e-4
    assert not any(".layers.1." in name for name in load_tensors(copy))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_of_gradients_counts_each_factor_once(dtype: str, trained: Path) -> None:
    """With the state of the optimizer spread as well, and with fp32 masters."""
    run = Run(trained / "model", trained / "rows.jsonl", lora=LORA, steps=2, dtype=dtype, max_grad_norm=0.0)
    alone = run_distributed(losses, 1, run)[0]
    for sizes in ({"distributed_optimizer": True}, {}):
        spread = run_distributed(losses, 4, replace(run, ep=2, etp=2, **sizes), timeout=120)
        for rank in spread:
            for (loss, norm), (wanted, wanted_norm) in zip(rank, alone, strict=True):
                assert loss == pytest.approx(wanted, rel=1e-4 if dtype == "float32" else 2e-2)
                assert norm == pytest.approx(wanted_norm, rel=1e-3 if dtype == "float32" else 0.1)
