"""What a user gets for bad input: one line that says what was got, what was wanted and what to do; exit code 2; nothing written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint, write_rows

ROOT = Path(__file__).parents[2]
Case = tuple[list[str], dict[str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``m``, rows ``rows.jsonl`` and a finished run ``run`` with two checkpoints."""
    folder = tmp_path_factory.mktemp("errors")
    make_checkpoint(folder / "m")
    write_rows(folder / "rows.jsonl")
    done = mswift(folder, ["sft", *basics(), "--output_dir", "run", "--max_steps", "2", "--save_steps", "1", "--global_batch_size", "4"])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    """A copy of `home` that a test may spoil."""
    return Path(shutil.copytree(home, tmp_path / "place"))


def basics(model: str = "m", rows: str = "rows.jsonl") -> list[str]:
    return ["--model", model, "--dataset", rows, "--torch_dtype", "float32", "--plot", "false", "--report_to", "none"]


def mswift(folder: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "mswift.cli", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=170, check=False)


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns if path.is_file() else 0 for path in sorted(folder.rglob("*"))}


def assert_one_line(place: Path, words: list[str], *parts: str, notes: int = 0, allowed: tuple[str, ...] = (), **environment: str) -> str:
    """Run, and check the line, the exit code and that nothing but `allowed` was written. `notes` are lines of information before it."""
    before = listing(place)
    done = mswift(place, words, **environment)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 + notes, done.stderr
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    assert all(part in lines[-1] for part in parts), lines[-1]
    changed = {name for name, time in listing(place).items() if before.get(name) != time and name not in allowed}
    assert not changed, changed
    return lines[-1]


def sft(*extra: str, model: str = "m", rows: str = "rows.jsonl") -> list[str]:
    return ["sft", *basics(model, rows), "--output_dir", "out", "--global_batch_size", "4", "--max_steps", "2", *extra]


def edit_config(place: Path, **changes: object) -> None:
    path = place / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage(place: Path, action: Callable[[Path], object]) -> None:
    action(place / "m" / "model.safetensors")


MODEL_FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "empty": (lambda p: [path.unlink() for path in (p / "m").iterdir()], ("m ", "config.json")),
    "no config": (lambda p: (p / "m/config.json").unlink(), ("config.json",)),
    "broken config": (lambda p: (p / "m/config.json").write_text('{"architectures": ["Ll'), ("config.json",)),
    "truncated": (lambda p: damage(p, lambda f: f.write_bytes(f.read_bytes()[:-100])), ("truncated or corrupt", "download or copy it again")),
    "corrupt header": (lambda p: damage(p, lambda f: f.write_bytes(f.read_bytes()[:8] + b"\xff" * 99)), ("truncated or corrupt",)),
    "pickle only": (lambda p: damage(p, lambda f: f.rename(f.with_name("pytorch_model.bin"))), ("pickle",)),
    "absent shard": (
        lambda p: damage(p, lambda f: (f.unlink(), f.with_name("model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'))),
        ("b.safetensors",),
    ),
    "unknown architecture": (
        lambda p: edit_config(p, architectures=["Qwen2MoeForCausalLM"]),
        ("Qwen2MoeForCausalLM is not supported", "nearest supported: Qwen2ForCausalLM"),
    ),
    "no tokenizer": (
        lambda p: [(p / "m" / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        ("has no tokenizer", "download them too"),
    ),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_models_that_cannot_be_read(fault: str, place: Path) -> None:
    spoil, parts = MODEL_FAULTS[fault]
    spoil(place)
    assert_one_line(place, sft(), *parts)


def test_missing_model(place: Path) -> None:
    assert_one_line(place, sft(model="nothing/here/x"), "model directory nothing/here/x does not exist", "hub id such as")
    assert_one_line(place, sft(model="nobody/nothing"), "nobody/nothing is not a local directory", "check the name and the connection")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--learning_rat", "1"], ("--learning_rat", "--learning_rate")),
        (["--lora_rank", "many"], ("--lora_rank", "many", "whole number")),
        (["--dataset", "absent.jsonl"], ("absent.jsonl: no such data file", "check --dataset")),
        (["--tensor_model_parallel_size", "2"], ("tp(2)", "1 process", "NPROC_PER_NODE=2")),
        (["--output_dir", "rows.jsonl"], ("rows.jsonl is a file", "give a folder")),
        (["--output_dir", "run"], ("run holds another run", "--resume_from_checkpoint auto", "--overwrite_output_dir true")),
        (["--resume_from_checkpoint", "m"], ("--resume_from_checkpoint m", "wanted a checkpoint-N folder")),
        (["--adapters", "absent"], ("adapter directory absent does not exist",)),
        (["--torch_dtype", "float16"], ("float16", "bfloat16")),
    ],
)
def test_flags_and_paths(words: list[str], parts: tuple[str, ...], place: Path) -> None:
    assert_one_line(place, sft(*words), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: [a\ndataset: b", ("c.yaml, line 2", "not YAML")),
        ("model: m\nlora_rnk: 3", ("c.yaml", "lora_rnk", "lora_rank")),
        ("model: m\nlora_rank: many", ("c.yaml", "lora_rank", "many")),
        ("- a\n- b", ("c.yaml", "wanted")),
    ],
)
def test_yaml_files(text: str, parts: tuple[str, ...], place: Path) -> None:
    (place / "c.yaml").write_text(text)
    assert_one_line(place, ["sft", "c.yaml"], *parts)


@pytest.mark.parametrize(
    ("sizes", "processes", "parts"),
    [
        (["--tensor_model_parallel_size", "5"], 5, ("MLP width 48 by tp(5)", "choose sizes that divide")),
        (["--pipeline_model_parallel_size", "3"], 3, ("4 layers by pp(3) x vpp(1) = 3",)),
        (["--tensor_model_parallel_size", "2"], 3, ("tp(2) x pp(1) x cp(1) = 2 does not divide 3",)),
    ],
)
def test_layouts_that_do_not_divide(sizes: list[str], processes: int, parts: tuple[str, ...], place: Path) -> None:
    assert_one_line(place, sft(*sizes), *parts, NPROC_PER_NODE=str(processes))


def test_a_port_in_use(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line(place, sft(), f"port {port}", "in use", NPROC_PER_NODE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def test_rows_that_cannot_be_read(place: Path) -> None:
    rows = (place / "rows.jsonl").read_text()
    (place / "a.jsonl").write_text(rows + '{"messages": [}\n')
    assert_one_line(place, sft(rows="a.jsonl"), "a.jsonl:25: not JSON", "one JSON object a line")
    (place / "b.jsonl").write_text(rows + '{"messages": [{"role": "user", "content": "x"}]}\n')
    assert_one_line(place, sft(rows="b.jsonl"), "b.jsonl:25", "assistant")


def test_all_rows_too_long(place: Path) -> None:
    report = ("out", "out/dropped_rows.txt")
    line = assert_one_line(place, sft("--max_length", "5"), "all 24 rows exceed max_length 5", "raise --max_length", allowed=report)
    assert "dropped_rows.txt" in line
    assert len((place / "out/dropped_rows.txt").read_text().splitlines()) == 24


def test_resuming_from_something_else(place: Path) -> None:
    make_checkpoint(place / "other", seed=5)
    resume = ["--resume_from_checkpoint", "auto", "--output_dir", "run"]
    assert_one_line(place, sft(*resume, model="other"), "run/checkpoint-2 was made from another base model")
    assert_one_line(place, sft(*resume, "--lora_rank", "4"), "run/checkpoint-2", "--lora_rank 8")
    state = next((place / "run/checkpoint-2/resume/state").glob("*.distcp"))
    state.write_bytes(state.read_bytes()[:1000])
    assert_one_line(place, sft(*resume), "checkpoint run/checkpoint-2 is damaged", "has 1000 bytes", "checkpoint-1")


def test_exports(place: Path) -> None:
    (place / "full").mkdir()
    (place / "full/file").write_text("mine")
    merge = ["export", "--adapters", "run/checkpoint-2", "--merge_lora", "true", "--output_dir", "full"]
    assert_one_line(place, merge, "--output_dir full exists already", "--exist_ok true")
    make_checkpoint(place / "wide", num_attention_heads=4, num_key_value_heads=2)
    words = ["export", "--model", "wide", "--adapters", "run/checkpoint-2", "--merge_lora", "true", "--output_dir", "merged"]
    assert_one_line(place, words, "another model", notes=1)


def test_two_processes_say_it_once(place: Path) -> None:
    line = assert_one_line(place, sft("--max_length", "5"), "all 24 rows exceed", allowed=("out", "out/dropped_rows.txt"), NPROC_PER_NODE="2")
    assert "rank" not in line


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_whole(place: Path, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: it needs root and CAP_SYS_ADMIN")
    try:
        done = mswift(place, [*sft("--save_steps", "1", "--max_steps", "40", "--lora_rank", "64"), "--output_dir", str(mount / "out")])
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "earlier checkpoints are whole" in lines[0]
        left = sorted(path.name for path in (mount / "out").glob("*checkpoint*"))
        assert left
        assert all(name.startswith("checkpoint-") for name in left), left
        assert all((mount / "out" / name / "resume/resume.json").exists() for name in left)
    finally:
        subprocess.run(["umount", mount], check=True)
