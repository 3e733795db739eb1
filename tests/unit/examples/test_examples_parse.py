"""Every example is what it says: YAML files that their command accepts, scripts that end in a command line that mswift accepts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mswift.config import SftConfig, parse_command, warnings_for
from mswift.launch import check_processes

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
SAY = f"""#!{sys.executable}
import json, os, sys
print(json.dumps({{"program": os.path.basename(sys.argv[0]), "argv": sys.argv[1:]}}))
"""


def accepted(words: list[str], *, world: int) -> SftConfig:
    """The config of ``sft FILE --flag ...``, checked as far as it can be before anything is loaded: flags, layout, batch, data."""
    assert words[0] in ("sft", "pt")
    config = parse_command("pt" if words[0] == "pt" else "sft", words[1:])
    check_processes(config, {"RANK": "0", "WORLD_SIZE": str(world)})
    assert set(warnings_for(config)) <= {"--num_train_epochs has no effect: --max_steps wins"}
    for name in config.data.dataset:
        assert (ROOT / name).is_file(), name
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_yaml_is_accepted_by_the_command_that_it_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf8")
    said = re.search(rf"^# (?:[^\n]*: )?(?:NPROC_PER_NODE=(\d+) )?mswift ((?:sft|pt) examples/{path.name}(?: --\w+ [\w/]+)*)$", text, re.MULTILINE)
    assert said is not None, "the head of the file says how it is used"
    config = accepted([*said[2].split(), *([] if "\nmodel:" in text else ["--model", "here/model"])], world=int(said[1] or 1))
    assert config.model.torch_dtype == "bfloat16"
    assert config.changed() >= {"learning_rate", "global_batch_size", "warmup_ratio", "dataset"}


def run_script(path: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """Run a script with programs in place of torchrun, srun and mswift that only say how they were called."""
    for name in ("torchrun", "srun", "mswift"):
        (folder / name).write_text(SAY, encoding="utf8")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder), "SLURM_SUBMIT_DIR": str(folder)}
    shell = shutil.which("bash")
    assert shell is not None
    done = subprocess.run([shell, str(path), *flags], env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_has_sound_syntax(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0
    assert checked.stderr == ""
    text = path.read_text(encoding="utf8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text


def test_torchrun_script_starts_what_mswift_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run_script(EXAMPLES / "torchrun.sh", tmp_path, "--model", "here/model", "--max_steps", "3")
    assert said["program"] == "torchrun"
    options, module, words = said["argv"][:3], said["argv"][3:5], said["argv"][5:]
    assert options == ["--standalone", "--nproc_per_node", "4"]
    assert module == ["-m", "mswift.cli"]
    monkeypatch.chdir(ROOT)
    config = accepted(words, world=4)
    assert config.train.max_steps == 3


def test_slurm_script_starts_what_mswift_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / "slurm.sbatch"
    said = run_script(path, tmp_path, "--model", "here/model")
    assert said["program"] == "srun"
    program = said["argv"].index("mswift")
    assert all(word.startswith("--") for word in said["argv"][:program])
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", path.read_text(encoding="utf8"), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"], "one process a GPU"
    monkeypatch.chdir(ROOT)
    config = accepted(said["argv"][program + 1 :], world=int(options["nodes"]) * int(options["ntasks-per-node"]))
    assert config.save.resume_from_checkpoint == "auto", "a requeued job goes on"
    assert config.model.model == "here/model"


def test_something_was_found() -> None:
    assert {path.name for path in CONFIGS} >= {"demo.yaml", "lora.yaml", "full.yaml", "pt.yaml"}
    assert {path.name for path in SCRIPTS} >= {"torchrun.sh", "slurm.sbatch"}
    others = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {path.name for path in (*CONFIGS, *SCRIPTS)}
    assert others == {"demo.py", "smollm2.py"}, "a new example needs a test"
