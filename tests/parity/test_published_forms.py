"""Checkpoints in other forms than a tensor for each expert of a text model: stacks of experts, and text models inside larger ones."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mswift.families import families
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.distributed.test_dry_run import imagined
from tests.distributed.test_megatron_checkpoint import Trip, assert_same, to_hf, to_megatron
from tests.parity.cases import CASES, MIXTURES, options_of
from tests.parity.ranks import adapter_logits
from tests.parity.reference import distance, load_tensors, logits_with
from tests.tiny import config_of, make_model, make_tokenizer

VISION = {
    "qwen3_5": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 72,
        "patch_size": 4,
        "num_position_embeddings": 16,
    },
    "llama4": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
WHOLE = {
    "qwen3_5": ("qwen3_5_text/plain", {"rope_parameters": MROPE}),
    "qwen3_5_moe": ("qwen3_5_moe_text/plain", {"rope_parameters": MROPE}),
    "llama4": ("llama4_text/plain", {}),
}
"""Models with a vision tower, and their text parts."""
BY_EXPERT = [family for family in MIXTURES if family not in ("gpt_oss", "granitemoe", "llama4_text")]
"""Families whose checkpoints have a tensor for each expert."""
HELD_OTHERWISE = ("ernie4_5_moe", "granitemoe", "minimax_m2", "mixtral", "phimoe")
"""Families of which transformers' model calls more than the experts otherwise than the checkpoints that are published."""


def randomise(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.1, 0.6, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
    return model.eval()


def write_whole(folder: Path, outer: str, **changes: Any) -> Path:
    """A checkpoint with a vision tower, as transformers writes it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    case, more = WHOLE[outer]
    family, own = options_of(case)
    text = config_of(family, **{**own, **more, **changes}).to_dict()
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    config = AutoConfig.for_model(outer, text_config=text, vision_config=VISION[outer.removesuffix("_moe")], **tied)
    randomise(AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    make_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def stack_experts(folder: Path) -> None:
    """Write the experts of each layer again as they are held in transformers' models: gate and up of all in one tensor, down in another."""
    tensors, experts = load_tensors(folder), dict[str, dict[int, dict[str, Tensor]]]()
    for name in list(tensors):
        match = re.fullmatch(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            experts.setdefault(f"{match[1]}.mlp.experts", {}).setdefault(int(match[2]), {})[match[3]] = tensors.pop(name)
    for module, of_layer in experts.items():
        gate, up, down = ("w1", "w3", "w2") if "w1" in of_layer[0] else ("gate_proj", "up_proj", "down_proj")
        ordered = [of_layer[expert] for expert in range(len(of_layer))]
        tensors[f"{module}.gate_up_proj"] = torch.stack([torch.cat((one[gate], one[up])) for one in ordered])
        tensors[f"{module}.down_proj"] = torch.stack([one[down] for one in ordered])
    assert experts
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_further_layer(folder: Path) -> None:
    """As Qwen3.5 writes a layer that predicts further ahead: its block is called otherwise, and its experts are stacks too."""
    tensors, prefix = load_tensors(folder), "model.language_model.layers.3."
    hidden = tensors["model.language_model.norm.weight"].numel()
    block = {f"mtp.layers.0.{name.removeprefix(prefix)}": tensor.flip(0).contiguous() for name, tensor in tensors.items() if name.startswith(prefix)}
    beside = {f"mtp.{name}.weight": torch.rand(hidden) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    fc = {"mtp.fc.weight": torch.rand(hidden, 2 * hidden)}
    save_file({**tensors, **block, **beside, **fc}, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "text_config": {**config["text_config"], "mtp_num_hidden_layers": 1}}))


def logits_and_left_out(rank: int, world: int, run: Run, ids: Tensor) -> tuple[Tensor | None, dict[str, int]]:
    model = open_model(run, world)
    return model.logits(ids), model.left_out


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 331, (2, 15), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("outer", "form", "sizes"),
    [
        ("qwen3_5", "written", {"tp": 2}),
        ("qwen3_5", "tied", {"pp": 2}),
        ("qwen3_5_moe", "written", {"ep": 2}),
        ("qwen3_5_moe", "stacked", {"ep": 2}),
        ("qwen3_5_moe", "further", {"tp": 2}),
        ("llama4", "written", {"pp": 2}),
    ],
)
def test_a_text_model_inside_a_larger_one(outer: str, form: str, sizes: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    source = write_whole(tmp_path / "source", outer, **({"tie_word_embeddings": True} if form == "tied" else {}))
    if form in ("stacked", "further"):
        stack_experts(source)
    if form == "further":
        add_further_layer(source)
    expected, tensors = logits_with(source, None, ids), load_tensors(source)
    run = Run(source, further=True, **sizes)
    held = run_distributed(logits_and_left_out, 2, run, ids, timeout=120)
    logits = next(logits for logits, _ in held if logits is not None)
    assert distance(logits, expected) < 1e-4
    towers = [name for name in tensors if "vi" in name.split(".language_model.")[0] or "projector" in name]
    assert held[0][1] == {"the vision tower": len(towers)}
    assert len(towers) > 10
    run_distributed(to_hf, 2, [Trip(run, tmp_path / "same")], timeout=120)
    assert_same(source, tmp_path / "same")
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "same"))
    assert before == after
    assert (tmp_path / "same" / "preprocessor_config.json").read_text() == "{}"
    run_distributed(to_megatron, 2, [Trip(run, tmp_path / "m")], timeout=120)
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m", further=True, pp=2), tmp_path / "text")], timeout=120)
    text = load_tensors(tmp_path / "text")
    assert not [name for name in text if "language_model" in name]
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    assert len(text) == len(tensors) - len(towers)
    assert json.loads((tmp_path / "text" / "config.json").read_text())["architectures"][0].endswith("ForCausalLM")
    assert distance(logits_with(tmp_path / "text", None, ids), expected) < 1e-5


@pytest.mark.parametrize("family", BY_EXPERT)
def test_stacks_of_experts_go_there_and_back(family: str, ids: Tensor, tmp_path: Path) -> None:
    make_model(family, **CASES[family]["plain"]).save_pretrained(tmp_path / "source")
    expected = logits_with(tmp_path / "source", None, ids)
    stack_experts(tmp_path / "source")
    assert distance(logits_with(tmp_path / "source", None, ids), expected) < 1e-5  # transformers reads it too
    run = Run(tmp_path / "source", ep=2)
    assert distance(run_distributed(logits_and_left_out, 2, run, ids, timeout=120)[0][0], expected) < 1e-4
    run_distributed(to_megatron, 2, [Trip(run, tmp_path / "m")], timeout=120)
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m", tp=2), tmp_path / "back")], timeout=120)
    assert_same(tmp_path / "source", tmp_path / "back")


def every_plan(rank: int, world: int, folders: Sequence[Path]) -> list[int]:
    """How many parameters each model has; it fails where a tensor is missing or is not read."""
    return [len(imagined(rank, world, folder, {})[0][2]) for folder in folders]


def test_what_transformers_writes_is_read_whole(tmp_path: Path) -> None:
    folders = []
    for family in (family.name for family in families()):
        model = make_model(family, **CASES[family]["plain"])
        model.save_pretrained(tmp_path / family)
        folders.append(tmp_path / family)
        if family not in HELD_OTHERWISE:
            model.save_pretrained(tmp_path / f"{family}-as-held", save_original_format=False)
            folders.append(tmp_path / f"{family}-as-held")
    assert len(folders) == 2 * len(families()) - len(HELD_OTHERWISE)
    assert min(run_distributed(every_plan, 1, folders, timeout=240)[0]) > 20


def test_an_adapter_of_the_larger_model(ids: Tensor, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = write_whole(tmp_path / "base", "qwen3_5_moe")
    targets = r".*language_model\.layers\.\d+\.(self_attn\.(q_proj|v_proj|o_proj)|linear_attn\.in_proj_z)"
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    randomise(model).save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.unload().save_pretrained(base)  # its own weights are random anew
    run = Run(base, tp=2, adapter=tmp_path / "adapter")
    held = run_distributed(adapter_logits, 2, [run], ids, [tmp_path / "copy"], timeout=120)
    assert distance(held[0][0], expected) < 1e-4
    assert distance(held[0][0], logits_with(base, None, ids)) > 0.01
    assert distance(logits_with(base, tmp_path / "copy", ids), expected) < 1e-4
