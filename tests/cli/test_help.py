"""The program without a command: help, version, unknown verbs, and nothing heavy imported for any of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mswift
from mswift import cli
from mswift.config import CONFIGS

ROOT = Path(mswift.__file__).parents[1]
HEAVY = {"torch", "transformers", "numpy", "rich", "megatron", "datasets", "matplotlib", "psutil", "yaml"}


def program(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-m", "mswift.cli", *words], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_program_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: mswift VERB")
    for verb in cli.VERBS:
        assert f"\n  {verb} " in out
    for variable in ("NPROC_PER_NODE", "MASTER_PORT", "MSWIFT_KEEP_MALLOC", "USE_HF"):
        assert variable in out
    assert out.count("mswift sft ") >= 2


@pytest.mark.parametrize("verb", list(cli.VERBS))
@pytest.mark.parametrize("columns", ["60", "100"])
def test_a_verb_lists_its_flags(verb: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main([verb.replace("-", "_"), "--lora_rank", "nonsense", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mswift {verb} ")
    assert set(CONFIGS[verb].flags()) <= {word.removeprefix("--") for word in out.split() if word.startswith("--")}
    assert "NPROC_PER_NODE" in out
    example = f"  mswift {verb} {cli.VERBS[verb].example}"
    assert max(len(line) for line in out.splitlines() if line != example) <= int(columns)
    assert cli.main(["help", verb]) == 0
    assert capsys.readouterr().out == out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"mswift {mswift.__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stf", "error: 'stf' is not a verb of mswift; did you mean mswift sft?\n"),
        ("merge_loar", "error: 'merge_loar' is not a verb of mswift; did you mean mswift merge-lora?\n"),
        ("zzz", "error: 'zzz' is not a verb of mswift; wanted one of sft, pt, infer, export, merge-lora, verify, data\n"),
        ("deploy", "error: mswift deploy is not supported yet; there are sft, pt, infer, export, merge-lora, verify, data\n"),
        ("web_ui", "error: mswift web-ui is not supported yet; there are sft, pt, infer, export, merge-lora, verify, data\n"),
        ("--model", "error: '--model' is not a verb of mswift; wanted one of sft, pt, infer, export, merge-lora, verify, data\n"),
    ],
)
def test_unknown_verbs(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", message)
    assert cli.main(["help", word]) == 2


def test_verbs_and_configs_agree() -> None:
    assert list(cli.VERBS) == list(CONFIGS)
    for verb in cli.VERBS.values():
        assert verb.run.startswith("mswift.commands.")
        assert verb.run.count(":") == 1
        assert verb.summary


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    code = (
        "import json, sys; from mswift import cli; "
        "codes = [cli.main(['--help']), cli.main(['sft', '--help']), cli.main(['sft', '--model', 'm', '--dataset', 'd', '--zzz'])]; "
        "print(); print(json.dumps([codes, sorted(sys.modules)]))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 2]
    assert HEAVY.isdisjoint(modules)
    assert done.stderr == "error: --zzz is not a flag of mswift sft; mswift sft --help lists all\n"


def test_the_real_program() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mswift {mswift.__version__}\n", "")
    done = program("sft", "--modle", "m", NPROC_PER_NODE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --modle is not a flag of mswift sft; did you mean --model?\n")
    done = program("sft", "--modle", "m", RANK="3")
    assert (done.returncode, done.stderr) == (2, "")


def test_help_into_a_closed_pipe_is_quiet() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        f"{sys.executable} -m mswift.cli sft --help | true", shell=True, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0
