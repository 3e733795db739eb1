"""vLLM, the real one for CPU, on what ``mswift export`` writes: log-probabilities and greedy answers are those of transformers and peft.

Its CPU build computes no adapters of experts: with them it looks for Triton, which has no CPU form. Everything before that is tested with it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.tuners.targets import ADAPTABLE
from tests.cli.program import Worker
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run
from tests.parity.cases import options_of
from tests.parity.ranks import train_lora
from tests.parity.reference import load_peft
from tests.parity.test_expert_lora import write_forms
from tests.tiny import make_checkpoint, make_peft_adapter, write_rows

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PROMPTS = [[5, 9, 200, 31, 77, 14], [2, 40, 41, 42, 300, 301, 6, 7, 8]]
NEW_TOKENS = 12
FITTING = {"head_dim": 32, "hidden_size": 96}
"""vLLM's attention takes heads of 32, 64, ..."""

LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
"""vLLM's names of what is adapted; where its CPU build wraps the head too, it fails on the log-probabilities of several prompts."""


def run_vllm(program: str, words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """One of the programs beside this file, by vLLM's interpreter; skips where there is none."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON.relative_to(ROOT)} is not there; make .venv-vllm/.set-up installs vLLM for CPU")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(PYTHON), str(Path(__file__).with_name(program)), *words]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300, check=False, cwd=folder)


def served(directory: Path, folder: Path, *words: str) -> list[dict[str, Any]]:
    """For every prompt the log-probabilities of its tokens and the greedy answer, by vLLM."""
    done = run_vllm("vllm_program.py", [str(directory), json.dumps(PROMPTS), str(NEW_TOKENS), *words], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_served(found: Sequence[Mapping[str, Any]], model: Any, bare: Any) -> None:
    """What vLLM says is what `model` says; `bare`, the model without its adapter, says something else."""
    for prompt, theirs in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores, unadapted = (m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for m in (model, bare))
            answer = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(theirs["log_probs"]), scores, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(scores, unadapted, atol=1e-2), "the adapter changes nothing, so it was not tested"
        assert theirs["answer"] == answer.tolist()


def bare_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def merge(folder: Path, kind: str, **changes: object) -> Path:
    """A tiny model, a random adapter by peft, and the two merged by us into several files."""
    make_peft_adapter(make_checkpoint(folder / "model", kind, **changes), folder / "adapter", r=3)
    words = ["export", "--model", "model", "--adapters", "adapter", "--merge_lora", "true", "--output_dir", "merged", "--max_shard_size", "100KB"]
    worker = Worker()
    outcome = worker.run([*words, "--load_args", "false"], folder)
    worker.close()
    assert outcome.code == 0, outcome.err
    assert len(list((folder / "merged").glob("*.safetensors"))) > 1
    return folder / "merged"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {"tie_word_embeddings": True})],
    ids=["llama", "qwen2", "qwen3-tied"],
)
def test_vllm_serves_a_merged_export(kind: str, changes: dict[str, object], tmp_path: Path) -> None:
    directory = merge(tmp_path, kind, **FITTING, **changes)
    assert_served(served(directory, tmp_path), bare_model(directory), bare_model(tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_vllm_serves_an_adapter_that_was_trained_here(lora: dict[str, Any], tmp_path: Path) -> None:
    """Beside its base; on two tensor-parallel ranks with padded heads."""
    base = make_checkpoint(tmp_path / "model", "llama", **FITTING)
    run = Run(base, write_rows(tmp_path / "rows.jsonl"), tp=2, steps=4, lora={"rank": 4, "alpha": 8.0, "dropout": 0.0, **lora})
    run_distributed(train_lora, 2, run, torch.tensor(PROMPTS[:1]), tmp_path, timeout=120)
    found = served(base, tmp_path, str(tmp_path / "adapter"), json.dumps(LINEAR))
    assert_served(found, load_peft(base, tmp_path / "adapter"), bare_model(base))


# ---- adapters of experts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, and an adapter on everything that vLLM can adapt in each form, none of whose factors is zero."""
    folder = tmp_path_factory.mktemp("mixture")
    family, changes = options_of("qwen3_moe/plain")
    base = make_checkpoint(folder / "model", family, **changes, **FITTING)
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ADAPTABLE}
    run_distributed(write_forms, 1, Run(base, lora=lora), folder, torch.tensor(PROMPTS[:1]))
    return folder


def deltas(held: Mapping[str, Mapping[str, list[Tensor]]]) -> dict[str, Tensor]:
    """What vLLM's buffers add to the weights of transformers' model, by the name of the parameter."""
    found = {}
    for name, parts in held.items():
        if name.endswith(".experts"):
            both = [b @ a for a, b in zip(parts["w13_lora_a"], parts["w13_lora_b"], strict=True)]
            found[f"{name}.gate_up_proj"] = torch.cat(both, 1)
            found[f"{name}.down_proj"] = parts["w2_lora_b"][0] @ parts["w2_lora_a"][0]
            continue
        if name == "model.embed_tokens":
            found[f"{name}.weight"] = parts["lora_a"][0] @ parts["lora_b"][0][0].t()
            continue
        fused = [b[0] @ a[0] for a, b in zip(parts["lora_a"], parts["lora_b"], strict=True)]
        names = [name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"] if name.endswith("qkv_proj") else [name]
        found |= {f"{one.replace('logits_processor', 'lm_head')}.weight": delta for one, delta in zip(names, fused, strict=True)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "forms"), [("2d", ["per-expert"]), ("3d", ["vllm-3d"]), ("mixed", ["per-expert", "vllm-3d"])], ids=["2d", "3d", "mixed"]
)
def test_vllm_reads_adapters_of_experts(mode: str, forms: list[str], mixture: Path, tmp_path: Path) -> None:
    """Its loader takes the file whole; what it then holds adds to every weight what peft adds."""
    done = run_vllm("vllm_experts_program.py", [str(mixture / "model"), str(tmp_path), mode, *(str(mixture / form) for form in forms)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    before = {name: tensor.clone() for name, tensor in bare_model(mixture / "model").state_dict().items()}
    after = load_peft(mixture / "model", mixture / "peft>=0.19").merge_and_unload().state_dict()
    for number in range(len(forms)):
        ours = deltas(torch.load(tmp_path / f"{number}.pt"))
        assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == set(ours)
        for name, delta in ours.items():
            torch.testing.assert_close(delta, after[name] - before[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_vllm_for_cpu_has_no_kernel_for_adapters_of_experts(mixture: Path, tmp_path: Path) -> None:
    """If this fails, it has one: then serve the adapter and compare."""
    words = [str(mixture / "model"), json.dumps(PROMPTS), str(NEW_TOKENS), str(mixture / "per-expert")]
    done = run_vllm("vllm_program.py", words, tmp_path)
    assert done.returncode != 0
    assert "module 'triton.language' has no attribute" in done.stderr
