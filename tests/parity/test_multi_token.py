"""Layers that predict tokens further ahead, trained: loss and gradients of a plain torch form of them (DeepSeek-V3, arXiv 2412.19437, 2.2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mswift.data.batches import MicroBatch
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run
from tests.distributed.test_dry_run import imagined
from tests.distributed.test_megatron_checkpoint import Trip, assert_same, names_of, to_hf, to_megatron
from tests.distributed.test_resume import test_resume_on_another_layout as check_resume
from tests.parity.cases import options_of
from tests.parity.ranks import measure
from tests.parity.reference import load_tensors, random_batches, written_gradients, written_tensors
from tests.tiny import make_checkpoint, make_model, make_tokenizer, write_rows

LAYERS = 4
FACTOR = 0.3


QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "shared_head.norm": "mtp.norm",
    "eh_proj": "mtp.fc",
    "": "mtp.layers.0",
}
"""DeepSeek-V3's names below the layer behind the last, and those of Qwen3-Next and Qwen3.5, as vLLM's models of them have them."""


def zero_centred(model: Any) -> bool:
    return model.config.model_type.startswith("qwen3_")


def named(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Under the names that the family's checkpoints have."""
    if not zero_centred(model):
        return tensors
    prefix, found = f"model.layers.{LAYERS}.", {}
    for name, tensor in tensors.items():
        its = next((its for ours, its in QWEN.items() if name.startswith(f"{prefix}{ours}{'.' if ours else ''}")), "")
        ours = next((ours for ours, other in QWEN.items() if other == its), "")
        found[its + "." + name.removeprefix(f"{prefix}{ours}{'.' if ours else ''}") if its else name] = tensor
    return found


def write_checkpoint(folder: Path, case: str, further: int) -> tuple[Any, dict[str, Tensor]]:
    """A checkpoint whose last `further` layers predict ahead; the model whose blocks they are, and the tensors beside the blocks."""
    family, changes = options_of(case)
    if family.startswith("qwen3_"):
        kinds = changes.get("layer_types", [*["linear_attention"] * (LAYERS - 1), "full_attention"])
        changes = {**changes, "layer_types": [*kinds, "full_attention"]}
    model = make_model(family, **changes, num_hidden_layers=LAYERS + further)
    model.config.num_hidden_layers = LAYERS
    said = {"num_nextn_predict_layers": further}
    if zero_centred(model):
        model.config.layer_types = model.config.layer_types[:LAYERS]
        said = {} if family == "qwen3_next" else {"mtp_num_hidden_layers": further}
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": [type(model).__name__], **said, "num_hidden_layers": LAYERS}))
    generator, hidden = torch.Generator().manual_seed(5), model.config.hidden_size
    beside = {}
    for layer in range(LAYERS, LAYERS + further):
        for name in ("enorm", "hnorm", "shared_head.norm"):
            beside[f"model.layers.{layer}.{name}.weight"] = torch.rand(hidden, generator=generator) + (-0.5 if zero_centred(model) else 0.5)
        beside[f"model.layers.{layer}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * 0.15
    tensors = written_tensors(model)
    copies = {}
    for layer in range(LAYERS, LAYERS + further) if said.keys() >= {"num_nextn_predict_layers"} else ():
        copies[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        copies[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(named({**tensors, **beside, **copies}, model), folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(folder)
    return model, beside


def ahead(x: Tensor) -> Tensor:
    """Each place gets what stands one place on; the last gets zero."""
    return torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)


def reference_loss(model: Any, beside: dict[str, Tensor], batches: Sequence[MicroBatch], further: int) -> tuple[Tensor, Tensor]:
    """(main loss, with `FACTOR` times the mean of the others added): sums over all tokens divided by the weight of all."""
    core, eps = model.model, model.config.rms_norm_eps
    main, added, weight = torch.zeros(()), torch.zeros(()), sum(float(batch.weights.sum()) for batch in batches)

    def score(state: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        log_probs = model.lm_head(state).float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        return -(log_probs * weights).sum() / weight

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), beside[name] + zero_centred(model), eps)

    for batch in batches:
        ids, labels, weights = batch.input_ids, batch.labels, batch.weights
        state = core.embed_tokens(ids)
        table = core.rotary_emb(state, position_ids=batch.position_ids)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for layer in core.layers[:LAYERS]:
            state = layer(state, attention_mask=None if hasattr(layer, "linear_attn") else mask, position_embeddings=table)
        state = core.norm(state)
        main = main + score(state, labels, weights)
        for number in range(LAYERS, LAYERS + further):
            ids, labels, weights = ahead(ids), ahead(labels), ahead(weights)
            prefix = f"model.layers.{number}."
            both = torch.cat((norm(core.embed_tokens(ids), f"{prefix}enorm.weight"), norm(state, f"{prefix}hnorm.weight")), -1)
            block = core.layers[number](both @ beside[f"{prefix}eh_proj.weight"].t(), attention_mask=mask, position_embeddings=table)
            state = norm(block, f"{prefix}shared_head.norm.weight")
            added = added + score(state, labels, weights)
    return main, main + FACTOR / further * added


SP2 = {"tp": 2, "sequence_parallel": True}
LAYOUTS = [
    ("deepseek_v3/plain", 1, 1, {}),
    ("deepseek_v3/halves-biases", 2, 1, {}),
    ("glm4_moe/one-group", 1, 2, SP2),
    ("deepseek_v3/plain", 2, 2, {"pp": 2}),
    ("glm4_moe/plain", 1, 2, {"ep": 2}),
    ("deepseek_v3/plain", 2, 2, {"cp": 2}),
    ("glm4_moe/one-group", 2, 4, {"pp": 2, **SP2}),
    ("deepseek_v3/plain", 1, 2, {"pp": 2, "vpp": 2}),
    ("qwen3_next/not-normalised-some-dense", 1, 2, {"ep": 2}),
    ("qwen3_5_text/plain", 1, 2, {"pp": 2}),
    ("qwen3_5_text/one-group", 1, 2, {"pp": 2}),
    ("qwen3_5_moe_text/plain", 1, 2, SP2),
]


@pytest.mark.parametrize(("case", "further", "world", "sizes"), LAYOUTS, ids=lambda part: "-".join(part) if isinstance(part, dict) else str(part))
def test_loss_and_gradients(case: str, further: int, world: int, sizes: dict[str, Any], tmp_path: Path) -> None:
    model, beside = write_checkpoint(tmp_path / "model", case, further)
    batches = random_batches()
    run = Run(tmp_path / "model", max_grad_norm=0.0, further=True, transformer={"mtp_loss_scaling_factor": FACTOR}, **sizes)
    ranks = run_distributed(measure, world, run, batches, tmp_path / "gradients", timeout=120)
    parts = {name: tensor.requires_grad_() for name, tensor in beside.items()}
    main, whole = reference_loss(model, parts, batches, further)
    whole.backward()
    assert float(whole) > float(main) + 0.1
    wanted = named({name: tensor.grad for name, tensor in parts.items() if tensor.grad is not None} | written_gradients(model), model)
    gradients = load_tensors(tmp_path / "gradients")
    assert set(gradients) == set(wanted)
    for name, gradient in wanted.items():
        assert gradient is not None
        if not name.endswith("e_score_correction_bias"):
            assert gradient.norm() > 0 or ".experts." in name, f"{name} has no effect, so nothing was compared"  # no token may choose an expert
            assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    norm = float(torch.stack([gradient.norm() for gradient in wanted.values() if gradient is not None]).norm())
    for rank in ranks:
        assert rank.loss == pytest.approx(float(main), rel=1e-5)
        assert rank.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(("written", "read"), [(SP2, {"pp": 2}), ({"pp": 2}, SP2), ({"ep": 2}, {"cp": 2})], ids=["tp-pp", "pp-tp", "ep-cp"])
@pytest.mark.parametrize("case", ["deepseek_v3/plain", "glm4_moe/one-group", "qwen3_next/plain", "qwen3_5_text/one-group", "qwen3_5_moe_text/plain"])
def test_no_tensor_is_lost_on_the_way_to_megatron_and_back(case: str, written: dict[str, Any], read: dict[str, Any], tmp_path: Path) -> None:
    source, several = tmp_path / "model", not case.startswith("qwen")
    if case.startswith("qwen") and "cp" in read:
        read = {"tp": 2}  # delta nets are not spread over context-parallel ranks
    if case.startswith("qwen3_5_text"):
        written = {name: size for name, size in written.items() if name != "ep"}
    write_checkpoint(source, case, 2 if several else 1)
    run_distributed(to_megatron, 2, [Trip(Run(source, further=True, **written), tmp_path / "m")], timeout=120)
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m", further=True, **read), tmp_path / "back")], timeout=120)
    assert_same(source, tmp_path / "back")
    run_distributed(to_hf, 2, [Trip(Run(source, **read), tmp_path / "carried")], timeout=120)
    assert_same(source, tmp_path / "carried")
    counts = {name for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers") if name in json.loads((source / "config.json").read_text())}
    config = json.loads((tmp_path / "carried" / "config.json").read_text())
    assert all(config[name] == 1 + several for name in counts)
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m", **read), tmp_path / "without")], timeout=120)
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert all(config[name] == 0 for name in counts or {"num_nextn_predict_layers"})
    assert len(load_tensors(source)) > len(load_tensors(tmp_path / "without"))


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_run_with_them_is_resumed(tuner: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "deepseek_v3/plain", 1)
    run = Run(tmp_path / "model", write_rows(tmp_path / "rows.jsonl"), lora={"rank": 4, "alpha": 8.0, "dropout": 0.0}, further=True)
    check_resume(tuner, (2, {"pp": 2}), (2, {"cp": 2}), run, tmp_path / "run")


def test_a_dry_run_has_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "glm4_moe/plain", 1)
    held = run_distributed(names_of, 1, Run(tmp_path / "model", further=True))[0]
    told = run_distributed(imagined, 1, tmp_path / "model", {}, timeout=120)[0]
    assert [name for name, _ in told[0][2]] == held
    assert sum(name.startswith("mtp.") for name in held) > 20


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_layers_that_are_not_built_go_into_an_export_as_they_are(sizes: dict[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "qwen3_5_text", **options_of("qwen3_5_text/plain")[1])
    beside = {"mtp.fc.weight": torch.randn(72, 144), "mtp.layers.0.mlp.experts.down_proj": torch.randn(3, 7, 5), "mtp.norm.weight": torch.randn(72)}
    save_file({**load_tensors(source), **beside}, source / "model.safetensors", metadata={"format": "pt"})
    run_distributed(to_hf, 2, [Trip(Run(source, **sizes), tmp_path / "out")], timeout=120)
    assert_same(source, tmp_path / "out")
    assert load_tensors(tmp_path / "out").keys() >= beside.keys()
