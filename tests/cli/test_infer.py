"""``mswift infer`` as a user runs it: a conversation through a pipe, a file of rows, an adapter, several processes, errors in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mswift import cli
from mswift.commands.infer import _check_replicas, _questions, _read_rows, _settings
from mswift.commands.session import Session, find_adapter, make_template
from mswift.config import InferConfig, read_command
from mswift.errors import ConfigError, DataError
from mswift.parallel.groups import Groups
from mswift.parallel.layout import ParallelLayout
from mswift.rollout.prompts import Question
from mswift.runtime.device import Runtime
from mswift.train.folders import RESUME_DIR, RESUME_FILE
from tests.tiny import make_checkpoint, make_peft_adapter, write_rows
from tests.unit.conversion.quantisers import quantise_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``adapter`` (by peft, naming the model) and ``rows.jsonl``."""
    folder = tmp_path_factory.mktemp("infer")
    write_rows(folder / "rows.jsonl", 5)
    make_peft_adapter(make_checkpoint(folder / "model"), folder / "adapter", r=2, lora_alpha=8, std=0.3)
    return folder


def start(*flags: object, processes: int = 1) -> subprocess.Popen[str]:
    many = {"NPROC_PER_NODE": str(processes)} if processes > 1 else {}
    return subprocess.Popen(
        [sys.executable, "-m", "mswift.cli", "infer", *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **many},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf8",
    )


def infer(*flags: object, typed: str = "", processes: int = 1) -> tuple[str, str]:
    """(stdout, stderr) of a run that succeeds."""
    process = start(*flags, processes=processes)
    out, err = process.communicate(typed, timeout=170)
    assert process.returncode == 0, err
    return out, err


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def test_a_conversation_of_one_process_and_of_two(folder: Path) -> None:
    typed = "who are you\nclear\nwho are you\ntell me more\nreset-system\nI am a bird\nwho are you\nquit\nnever answered\n"
    flags = ("--adapters", folder / "adapter", "--max_new_tokens", 6, "--temperature", "0.9", "--seed", 3)
    out, err = infer(*flags, typed=typed)
    assert any(out[:end] == out[end : 2 * end] for end in range(2, len(out) // 2 + 1)), "after clear the answer is the first one again"
    assert f"model {folder / 'model'}" in err
    assert "float32 on cpu" in err
    assert "temperature 0.9" in err
    assert "forgotten" in err
    assert "<<<" not in out + err
    two, err = infer(*flags, "--tensor_model_parallel_size", 2, typed=typed, processes=2)
    assert two == out
    assert "tp2" in err


def test_rows_are_answered_into_a_file(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(lines_of(folder / "rows.jsonl"))))
    flags = ("--val_dataset", rows, "--max_new_tokens", 6)
    out, _ = infer(*flags, "--adapters", folder / "adapter")
    (default,) = (folder / "adapter" / "infer_result").glob("*.jsonl")
    assert re.fullmatch(rf"5 of 5 answers in {re.escape(str(default))}; \d+ tokens in [\d.]+ s, [\d.]+ tokens/s\n", out)
    lines = lines_of(default)
    assert [line["id"] for line in lines] == [0, 1, 2, 3, 4]
    for line, row in zip(lines, lines_of(rows), strict=True):
        question, label = row["messages"]
        assert line["messages"] == [question, {"role": "assistant", "content": line["response"]}]
        assert line["labels"] == label["content"]
    infer(*flags, "--adapters", folder / "adapter", "--result_path", tmp_path / "two.jsonl", "--max_batch_size", 2, processes=2)
    assert (tmp_path / "two.jsonl").read_bytes() == default.read_bytes()


def test_a_quantised_model_answers_like_the_plain_one(folder: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(folder / "model", tmp_path / "plain")
    quantised = quantise_checkpoint(plain, tmp_path / "quantised", "fp8-blocks")
    flags = ("--val_dataset", folder / "rows.jsonl", "--max_new_tokens", 6)
    for model, processes in ((quantised, 2), (plain, 1)):
        out, _ = infer("--model", model, *flags, "--result_path", tmp_path / f"{model.name}.jsonl", processes=processes)
        assert out.startswith("5 of 5 answers in ")
    assert (tmp_path / "quantised.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


def test_an_interrupted_run_leaves_whole_lines(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    process = start("--model", folder / "model", "--val_dataset", f"{folder / 'rows.jsonl'}#500", "--max_new_tokens", 30, "--result_path", path)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = lines_of(path)
    assert out == f"{len(lines)} of 500 answers in {path}; the rest was not answered\n"
    assert 2 <= len(lines) < 500
    assert err.endswith("interrupted\n")


def broken(folder: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    """Flags that cannot work, and what the one line says of them."""
    model, rows = folder / "model", folder / "rows.jsonl"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "taken.jsonl").write_text("mine")
    return {
        "no model": ([], "--model is required"),
        "no such adapter": (["--model", model, "--adapters", tmp_path / "none"], "does not exist; give a directory with adapter_config.json"),
        "no adapter there": (["--model", model, "--adapters", model], "has no adapter_config.json"),
        "two adapters": (["--model", model, "--adapters", folder / "adapter", folder / "adapter"], "got 2 adapters, wanted one"),
        "no rows": (["--model", model, "--val_dataset", tmp_path / "empty.jsonl"], "empty.jsonl: holds no rows"),
        "taken": (["--model", model, "--val_dataset", rows, "--result_path", tmp_path / "taken.jsonl"], "taken.jsonl exists already"),
        "no folder": (["--model", model, "--val_dataset", rows, "--result_path", tmp_path / "taken.jsonl" / "x"], "taken.jsonl is a file"),
    }


def test_errors_are_one_line_and_write_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, expected in broken(folder, tmp_path).values():
        before = sorted(path for place in (folder, tmp_path) for path in place.rglob("*"))
        assert cli.main(["infer", *map(str, flags)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert expected in captured.err
        assert sorted(path for place in (folder, tmp_path) for path in place.rglob("*")) == before


def test_an_adapter_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", hidden_size=60)
    process = start("--model", other, "--adapters", folder / "adapter")
    out, err = process.communicate("", timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert "another model" in err
    assert err.count("\n") == 1


def test_a_prompt_that_is_too_long_is_refused_or_cut(folder: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"query": "bird " * 300}) + "\n")

    def questions(*flags: str) -> list[Question]:
        config = read_command("infer", ["--model", str(folder / "model"), "--val_dataset", str(long), *flags], {}).config
        assert isinstance(config, InferConfig)
        rows = _read_rows(config)
        assert rows is not None
        settings, encoder = _settings(config, make_template(folder / "model", config.model, config.template), folder / "model")
        return _questions(config, rows, encoder, settings, folder / "model")

    with pytest.raises(DataError, match=r"long.jsonl:1: the prompt has \d+ tokens and the longest sequence is 256; "):
        questions()
    with pytest.raises(DataError, match="the longest sequence is 100; "):
        questions("--max_length", "100")
    assert len(questions("--truncation_strategy", "left", "--max_new_tokens", "20")[0].prompt) == 236
    (question,) = questions("--truncation_strategy", "left")
    assert (len(question.prompt), question.label) == (128, None)


def test_the_newest_checkpoint_of_a_run_answers(folder: Path, tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint = shutil.copytree(folder / "adapter", tmp_path / "run" / f"checkpoint-{step}")
        (checkpoint / RESUME_DIR).mkdir()
        (checkpoint / RESUME_DIR / RESUME_FILE).touch()
    assert find_adapter([str(tmp_path / "run")]) == tmp_path / "run" / "checkpoint-10"
    assert find_adapter([str(tmp_path / "run" / "checkpoint-9")]) == tmp_path / "run" / "checkpoint-9"
    assert find_adapter([]) is None


def test_a_conversation_has_one_copy_of_the_model(folder: Path) -> None:
    layout = ParallelLayout(world=4, tp=2)
    session = Session(folder, Runtime(torch.device("cpu"), "gloo"), Groups(layout, 0, layout.coords(0), None))
    with pytest.raises(ConfigError, match=r"needs one copy of the model, got 2: .*--tensor_model_parallel_size 4"):
        _check_replicas(session, conversation=True)
    _check_replicas(session, conversation=False)
    assert layout.dp == 2
