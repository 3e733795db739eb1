"""GB per second of a conversion beside a copy of the same files: Hugging Face -> Megatron -> Hugging Face, of a synthetic dense and MoE model.

Each pair is a conversion and a `cp`, in turn, both from a cold cache and both until the disk has everything (sync). A conversion's time is what the
program says of reading and writing, and the sync after it; the whole command, in which Python and its libraries start, is beside it. The last line
is JSON: rows of ``name, ours, peer, peer_name, ratio`` (GB/s; median of the ratios of pairs), with the peak memory of a process and its limit (its
shard + largest tensor + 1 GiB).

Usage: python benchmarks/convert.py --folder DIR [--models dense moe] [--only to_mcore to_hf] [--ranks 2] [--pairs 3] [--scale 1.0]
One model in one direction is a piece that can be measured by itself; what it starts from is made if it is not in DIR yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMON = {"torch_dtype": "bfloat16", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
DENSE = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 64000,
    "rope_theta": 500000.0,
}
MOE = {
    **COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 64000,
    "rope_theta": 1000000.0,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
MODELS = {"dense": (DENSE, "--tensor_model_parallel_size"), "moe": (MOE, "--expert_model_parallel_size")}


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of one of the two models, by name and shape."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    experts, ffn = config.get("num_experts"), config.get("moe_intermediate_size", config["intermediate_size"])
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
        for name, shape in {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}.items():
            yield f"{at}self_attn.{name}_proj.weight", shape
        if experts:
            yield from ((f"{at}self_attn.{name}_norm.weight", (head_dim,)) for name in "qk")
            yield f"{at}mlp.gate.weight", (experts, hidden)
        for place in [f"{at}mlp.experts.{expert}." for expert in range(experts)] if experts else [f"{at}mlp."]:
            yield from ((f"{place}{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
            yield f"{place}down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make_model(config: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint of random bits (finite bf16) in files of 1 GB, if it is not there."""
    import torch

    from mswift.conversion.file_plan import index_of, plan_files
    from mswift.conversion.safetensors_io import ShardWriter, TensorSpec

    if (folder / "config.json").exists() and json.loads((folder / "config.json").read_text()) == config:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    block = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    files = plan_files([{name: TensorSpec(torch.bfloat16, shape) for name, shape in tensors_of(config)}], 10**9)
    for file in files:
        with ShardWriter(folder / file.name, file.specs) as writer:
            for name, spec in file.specs.items():
                count = spec.nbytes // 2
                writer.write(name, block.repeat(-(-count // len(block)))[:count].view(spec.shape))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(files)))
    (folder / "config.json").write_text(json.dumps(config))


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(source: Path, target: Path, action: Callable[[], str]) -> tuple[float, float, str]:
    """Seconds of an action on a cold source, and of the sync after it until its target is on the disk; what it said."""
    shutil.rmtree(target, ignore_errors=True)
    forget(source)
    begun = time.perf_counter()
    said = action()
    done = time.perf_counter()
    os.sync()
    return done - begun, time.perf_counter() - done, said


def convert(program: str, source: Path, target: Path, flags: list[str], ranks: int) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "converters" / f"{program}.py"), "--model", str(source), "--output", str(target), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def copy(source: Path, target: Path) -> str:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return ""


def measure(name: str, program: str, source: Path, target: Path, flags: list[str], ranks: int, pairs: int) -> dict[str, Any]:
    """One row: conversions and copies in turn."""
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 1e9
    ours, peer, command, peaks = [], [], [], []
    for _ in range(pairs):
        seconds, synced, said = timed(source, target, lambda: convert(program, source, target, flags, ranks))
        command.append(size / (seconds + synced))
        ours.append(size / (float(re.findall(r"MiB in ([\d.]+) s", said)[0]) + synced))
        peaks.append(float(re.findall(r"at most ([\d.]+) GiB", said)[0]))
        peer.append(size / sum(timed(source, target.with_name("copy"), lambda: copy(source, target.with_name("copy")))[:2]))
        shutil.rmtree(target.with_name("copy"))
    row = {"name": name, "ours": statistics.median(ours), "peer": statistics.median(peer), "peer_name": "cp", "size_gb": size, "ranks": ranks}
    row |= {
        "ratio": statistics.median(one / other for one, other in zip(ours, peer)),
        "command_gb_s": statistics.median(command),
        "peak_gib": max(peaks),
    }
    print(json.dumps(row), flush=True)
    return row


PROGRAMS = {"to_mcore": "hf_to_megatron", "to_hf": "megatron_to_hf"}


def pieces(kind: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    config, flag = MODELS[kind]
    config = {**config, "num_hidden_layers": max(2, round(config["num_hidden_layers"] * options.scale))}
    source, megatron = options.folder / kind, options.folder / f"{kind}-mcore"
    make_model(config, source)
    largest = max(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in tensors_of(config)) / 2**30
    whole = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2**30
    spread = sum(2 * shape[0] * shape[1] for name, shape in tensors_of(config) if ".experts." in name) / 2**30
    for ranks in options.ranks:
        flags = [flag, str(ranks)]
        for way in options.only:
            start, end = (source, megatron) if way == "to_mcore" else (megatron, options.folder / f"{kind}-hf")
            if not start.exists():
                convert(PROGRAMS["to_mcore"], source, start, flags, ranks)
            row = measure(f"{kind} {PROGRAMS[way]} {flag} {ranks}", PROGRAMS[way], start, end, flags, ranks, options.pairs)
            limit = (whole - spread) / (ranks if kind == "dense" else 1) + spread / ranks + largest + 1
            yield {**row, "limit_gib": limit, "within_limit": row["peak_gib"] <= limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; needs 35 GB")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), help="directions")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers, for a quick look")
    options = parser.parse_args()
    print(json.dumps([row for kind in options.models for row in pieces(kind, options)]))


if __name__ == "__main__":
    main()
