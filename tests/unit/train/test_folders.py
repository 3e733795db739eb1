"""Checkpoint folders as they look from outside: which there are, which are whole, whose they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mswift.errors import CheckpointError
from mswift.train.folders import (
    ResumePoint,
    RunIdentity,
    check_flags,
    check_identity,
    find_checkpoint,
    fingerprint_model,
    list_checkpoints,
    read_resume_point,
    state_files,
)

IDENTITY = RunIdentity(model="m", trained="t", data="d", global_batch_size=4, seed=42)
FLAGS = {"model": "base", "tuner_type": "lora", "lora_rank": 8, "lora_alpha": 32, "use_rslora": False, "use_distributed_optimizer": None}


def make(output_dir: Path, step: int) -> Path:
    directory = output_dir / f"checkpoint-{step}"
    (directory / "resume" / "state").mkdir(parents=True)
    (directory / "resume" / "state" / "0.distcp").write_bytes(bytes(100))
    (directory / "args.json").write_text(json.dumps(FLAGS | {"target_modules": ["q_proj", "k_proj"]}))
    ResumePoint(step, IDENTITY, state_files(directory)).write(directory, world=1)
    return directory


def test_a_point_is_read_as_it_was_written(tmp_path: Path) -> None:
    directory = make(tmp_path, 3)
    assert read_resume_point(directory) == ResumePoint(3, IDENTITY, {"0.distcp": 100})
    assert json.loads((directory / "resume" / "resume.json").read_text())["world"] == 1


def test_checkpoints_are_listed_by_step_and_only_complete_ones(tmp_path: Path) -> None:
    steps = [make(tmp_path, step) for step in (10, 9, 100)]
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / ".checkpoint-300.incomplete").mkdir()
    assert list_checkpoints(tmp_path) == [steps[1], steps[0], steps[2]]
    assert find_checkpoint("auto", tmp_path) == steps[2]
    assert find_checkpoint(str(steps[1]), tmp_path) == steps[1]
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("auto", tmp_path / "elsewhere") is None
    with pytest.raises(
        CheckpointError, match=r"checkpoint-200/resume/resume\.json is not there; wanted a checkpoint-N folder; the newest in .* is checkpoint-100"
    ):
        find_checkpoint(str(tmp_path / "checkpoint-200"), tmp_path)


def test_a_damaged_one_names_another_if_there_is_any(tmp_path: Path) -> None:
    directory = make(tmp_path, 4)
    (directory / "resume" / "state" / "0.distcp").write_bytes(bytes(60))
    with pytest.raises(CheckpointError, match=r"0\.distcp has 60 bytes, wanted 100 bytes; there is no other one beside it; start anew$"):
        find_checkpoint("auto", tmp_path)
    other = make(tmp_path, 2)
    with pytest.raises(CheckpointError, match=f"give another one, such as --resume_from_checkpoint {other}$"):
        find_checkpoint("auto", tmp_path)
    assert find_checkpoint(str(other), tmp_path) == other


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 1, "identity": {"model": "m"}, "files": {}}', '{"step": "x", "identity": {}}'])
def test_a_broken_document_is_damage(text: str, tmp_path: Path) -> None:
    directory = make(tmp_path, 4)
    (directory / "resume" / "resume.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged: resume/resume\.json is not what mswift writes \(\w+: "):
        read_resume_point(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "was made with --lora_rank 8, got 4; give the same"),
        ({"use_rslora": True}, "was made with --use_rslora false, got true"),
        ({"tuner_type": "full"}, "was made with --tuner_type lora, got full"),
        ({"use_distributed_optimizer": True}, "was made with --use_distributed_optimizer false, got true"),
    ],
)
def test_other_flags_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    directory = make(tmp_path, 4)
    check_flags(directory, FLAGS | {"use_distributed_optimizer": False})  # None and false are the same
    with pytest.raises(CheckpointError, match=message):
        check_flags(directory, FLAGS | changes)
    (directory / "args.json").unlink()
    check_flags(directory, FLAGS | changes)


def test_another_run_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path, 4)
    check_identity(directory, IDENTITY, IDENTITY)
    with pytest.raises(CheckpointError, match=r"made from another base model than --model; give the one of its run \(base\)$"):
        check_identity(directory, IDENTITY, RunIdentity("other", "t", "d", 4, 42))
    with pytest.raises(CheckpointError, match=r"other trained tensors than this run; .*--lora_rank 8 --target_modules q_proj k_proj$"):
        check_identity(directory, IDENTITY, RunIdentity("m", "other", "d", 4, 42))


def test_the_fingerprint_sees_weights_and_config_but_not_where_they_lie(tmp_path: Path) -> None:
    prints = []
    for name, config, weights in (("a", {"x": 1}, b"1"), ("b", {"x": 1}, b"1"), ("c", {"x": 2}, b"1"), ("d", {"x": 1}, b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "_name_or_path": name}))
        (tmp_path / name / "model.safetensors").write_bytes(bytes(70000) + weights * 70000)
        prints.append(fingerprint_model(tmp_path / name))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
