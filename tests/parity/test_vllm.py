"""vLLM, the real one for CPU, on what ``mswift export --merge_lora true`` writes: the log-probabilities and greedy answers are transformers'."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.cli.program import Worker
from tests.tiny import make_checkpoint, make_peft_adapter

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PROMPTS = [[5, 9, 200, 31, 77, 14], [2, 40, 41, 42, 300, 301, 6, 7, 8]]
NEW_TOKENS = 12


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
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON.relative_to(ROOT)} is not there; make .venv-vllm/.set-up installs vLLM for CPU")
    from transformers import AutoModelForCausalLM

    directory = merge(tmp_path, kind, head_dim=32, hidden_size=96, **changes)  # vLLM's attention takes heads of 32, 64, ...
    command = [str(PYTHON), str(Path(__file__).with_name("vllm_program.py")), str(directory), json.dumps(PROMPTS), str(NEW_TOKENS)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for prompt, theirs in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores, unadapted = (m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for m in (model, bare))
            answer = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(theirs["log_probs"]), scores, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(scores, unadapted, atol=1e-2), "the adapter changes nothing, so it was not tested"
        assert theirs["answer"] == answer.tolist()
