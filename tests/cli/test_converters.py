"""The programs in converters/, run as a user runs them: there and back, verified, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.cases import options_of
from tests.parity.test_multi_token import write_checkpoint
from tests.tiny import make_checkpoint, make_peft_adapter

ROOT = Path(__file__).parents[2]
EP2 = ("--expert_model_parallel_size", "2")


def run(program: str, *words: str | Path, processes: int = 1, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "NPROC_PER_NODE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({"NPROC_PER_NODE": str(processes)} if processes > 1 else {})
    command = [sys.executable, str(ROOT / "converters" / f"{program}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=180)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converters")
    family, changes = options_of("qwen3_moe/plain")
    make_checkpoint(path / "hf", family, **changes)
    return path


@pytest.fixture(scope="module")
def megatron(folder: Path) -> Path:
    done = run("hf_to_megatron", "--model", "hf", "--output", "megatron", *EP2, "--max_shard_size", "100KB", processes=2, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "GB/s" in done.stderr
    assert "GiB of memory in one process" in done.stderr
    assert "talk to it: mswift infer --model megatron" in done.stdout
    return folder / "megatron"


def test_there_and_back_is_the_same(folder: Path, megatron: Path) -> None:
    assert json.loads((megatron / "mswift.json").read_text())["family"] == "qwen3_moe"
    against = run("verify", "megatron", "--against-hf", "hf", folder=folder)
    assert against.returncode == 0, against.stderr
    assert "logits of 64 random tokens" in against.stderr
    assert against.stdout.strip() == "equal: megatron and hf"
    back = run("megatron_to_hf", "--model", "megatron", "--output", "back", folder=folder)
    assert back.returncode == 0, back.stderr
    same = run("verify", "back", "hf", folder=folder)
    assert same.returncode == 0, same.stderr
    assert "111 of 111 equal" in same.stderr


def test_a_difference_has_exit_code_1_and_is_named(folder: Path, megatron: Path) -> None:
    from safetensors.torch import load_file, save_file

    family, changes = options_of("qwen3_moe/plain")
    other = make_checkpoint(folder / "other", family, **changes)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    done = run("verify", "megatron", "--against-hf", "other", *EP2, processes=2, folder=folder)
    assert done.returncode == 1
    assert "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight (rank 1)" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert "error: 1 of 110 tensors of megatron and other differ" in done.stderr
    assert "Traceback" not in done.stderr


def test_layers_that_predict_further_ahead_are_compared_and_nothing_else_is_said(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", "deepseek_v3/plain", 1)
    there = run("hf_to_megatron", "--model", "hf", "--output", "megatron", folder=tmp_path)
    assert there.returncode == 0, there.stderr
    same = run("verify", "megatron", "--against-hf", "hf", "--pipeline_model_parallel_size", "2", processes=2, folder=tmp_path)
    assert same.returncode == 0, same.stderr
    assert same.stdout.strip() == "equal: megatron and hf"
    counted, told = same.stderr.splitlines()
    assert counted.startswith("tensors: 135 of 135 equal")
    assert told.startswith("logits of 64 random tokens")


def test_a_dry_run_writes_nothing_and_finds_what_is_missing(folder: Path) -> None:
    done = run("hf_to_megatron", "--model", "hf", "--output", "never", "--dry_run", *EP2, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "12 x decoder.layers.N.mlp.experts.local_experts.E.linear_fc2.weight (72, 28)" in done.stdout
    assert "GiB of memory in each process" in done.stdout
    assert done.stdout.endswith("nothing was written\n")
    assert not (folder / "never").exists()
    assert not list(folder.glob(".never*"))


def test_an_adapter_there_and_back(folder: Path) -> None:
    base = make_checkpoint(folder / "dense")
    make_peft_adapter(base, folder / "peft")
    there = run("adapter", "--model", "dense", "--adapters", "peft", "--output", "m-adapter", folder=folder)
    assert there.returncode == 0, there.stderr
    assert "--mcore_adapter m-adapter --to_peft_format true" in there.stdout
    back = run("adapter", "--model", "dense", "--mcore_adapter", "m-adapter", "--output", "peft2", folder=folder)
    assert back.returncode == 0, back.stderr
    wrong = run("adapter", "--model", "dense", "--mcore_adapter", "peft", "--output", "peft3", folder=folder)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --mcore_adapter peft is not a Megatron adapter")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("hf_to_megatron", ("--model", "hf", "--output", "hf"), "--output_dir hf exists already"),
        ("hf_to_megatron", ("--model", "hf", "--output", "x", *EP2), "does not divide 1 process(es)"),
        ("megatron_to_hf", ("--model", "absent", "--output", "x"), "absent is not a local directory"),
        ("verify", ("hf",), "--against is required"),
        ("verify", ("hf", "hf", "hf"), "--unexpected is not a flag"),
    ],
)
def test_mistakes_are_one_line(program: str, words: tuple[str, ...], said: str, folder: Path) -> None:
    done = run(program, *words, folder=folder)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("program", ["hf_to_megatron", "megatron_to_hf", "adapter", "verify"])
def test_help_says_how_it_is_started(program: str, folder: Path) -> None:
    done = run(program, "--help", folder=folder)
    assert done.returncode == 0
    assert f"python converters/{program}.py" in done.stdout
    assert "--tensor_model_parallel_size" in done.stdout
