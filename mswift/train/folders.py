"""The checkpoint folders of a run, seen without torch: which there are, whether one is whole, and what run it belongs to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mswift.config.fields import plain
from mswift.conversion.directories import weight_paths
from mswift.errors import CheckpointError, one_line

RESUME_DIR, RESUME_FILE, STATE_DIR = "resume", "resume.json", "state"
_OPTIMIZER_FLAGS, _LORA_FLAGS = (
    ("tuner_type", "use_distributed_optimizer"),
    (
        "lora_rank",
        "lora_alpha",
        "use_rslora",
        "quant_bits",
        "bnb_4bit_use_double_quant",
    ),
)
_TUNER_FLAGS = ("tuner_type", "lora_rank", "target_modules", "tensor_model_parallel_size")


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What must not change between a checkpoint and the run that resumes from it.

    Args:
        model: fingerprint of the base model. trained: fingerprint of the names and shapes of the trained tensors.
        data: fingerprint of the training rows. global_batch_size, seed: with the step they say which rows come next.
    """

    model: str
    trained: str
    data: str
    global_batch_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a checkpoint says of itself: steps done, the run it is of, and the size in bytes of every file of its state."""

    step: int
    identity: RunIdentity
    files: dict[str, int]

    def write(self, directory: Path, **notes: object) -> None:
        """Write `RESUME_FILE` into a checkpoint; `notes` are for people."""
        path = directory / RESUME_DIR / RESUME_FILE
        path.write_text(json.dumps({**asdict(self), **notes}, indent=1), encoding="utf8")


def fingerprint_model(directory: Path) -> str:
    """SHA-256 over config.json and, for every file of weights, its size, its first 64 KiB (the header) and 64 KiB of its middle."""
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text(encoding="utf8"))
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in weight_paths(directory):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(65536))
            file.seek(size // 2)
            digest.update(file.read(65536))
    return digest.hexdigest()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(found) if (path / RESUME_DIR / RESUME_FILE).is_file()]


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, whole as far as the sizes of its files tell; None to start anew.

    Args:
        wanted: value of ``--resume_from_checkpoint``: None, ``auto`` (the newest one, if there is any) or a path.

    Raises:
        CheckpointError: the path is no checkpoint, or it is damaged.
    """
    if wanted is None:
        return None
    found = list_checkpoints(output_dir)
    if wanted == "auto" and not found:
        return None
    path = found[-1] if wanted == "auto" else Path(wanted).expanduser()
    if not (path / RESUME_DIR / RESUME_FILE).is_file():
        hint = f"; the newest in {output_dir} is {found[-1].name}" if found else ""
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted}: {path / RESUME_DIR / RESUME_FILE} is not there; wanted a checkpoint-N folder{hint}"
        )
    read_resume_point(path)
    return path


def state_files(directory: Path) -> dict[str, int]:
    """Name and bytes of every file of a checkpoint's state."""
    return {path.name: path.stat().st_size for path in sorted((directory / RESUME_DIR / STATE_DIR).iterdir())}


def read_resume_point(directory: Path) -> ResumePoint:
    """What a checkpoint says of itself, after a look at the files of its state.

    Raises:
        CheckpointError: it is damaged; with an earlier one, if there is any.
    """
    path = directory / RESUME_DIR / RESUME_FILE
    try:
        document = json.loads(path.read_text(encoding="utf8"))
        point = ResumePoint(int(document["step"]), RunIdentity(**document["identity"]), dict(document["files"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory, f"{RESUME_DIR}/{RESUME_FILE} is not what mswift writes ({type(error).__name__}: {one_line(error)})") from error
    for name, size in point.files.items():
        file = directory / RESUME_DIR / STATE_DIR / name
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            got = "is missing" if there is None else f"has {there} bytes"
            raise damaged(directory, f"{RESUME_DIR}/{STATE_DIR}/{name} {got}, wanted {size} bytes")
    return point


def damaged(directory: Path, what: str) -> CheckpointError:
    """The error about a checkpoint that cannot be resumed from."""
    others = [path for path in list_checkpoints(directory.parent) if path.name != directory.name]
    hint = f"give another one, such as --resume_from_checkpoint {others[-1]}" if others else "there is no other one beside it; start anew"
    return CheckpointError(f"checkpoint {directory} is damaged: {what}; {hint}")


def check_base(directory: Path, model: Path) -> None:
    """Refuse a checkpoint of another base model.

    Raises:
        CheckpointError: it was made from another model than the one in `model`, or is damaged.
    """
    _compare_base(directory, read_resume_point(directory).identity.model, fingerprint_model(model))


def check_flags(directory: Path, flags: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run with other settings of what is trained and how its optimizer is kept.

    Args:
        flags: of this run, by name.

    Raises:
        CheckpointError: with the first flag that differs.
    """
    saved = saved_flags(directory)
    names = _OPTIMIZER_FLAGS if flags["tuner_type"] == "full" else (*_OPTIMIZER_FLAGS, *_LORA_FLAGS)
    for name in names:
        if name in saved and (saved[name] or False) != (flags[name] or False):
            made, got = plain(saved[name] or False), plain(flags[name] or False)
            raise CheckpointError(f"{directory} was made with --{name} {made}, got {got}; give the same, or start anew in another --output_dir")


def check_identity(directory: Path, saved: RunIdentity, now: RunIdentity) -> None:
    """Refuse a checkpoint of another base model or of other trained tensors.

    Raises:
        CheckpointError: with the flags that the checkpoint was made with.
    """
    _compare_base(directory, saved.model, now.model)
    if saved.trained != now.trained:
        flags = saved_flags(directory)
        made = " ".join(f"--{name} {plain(flags[name])}" for name in _TUNER_FLAGS if name in flags)
        raise CheckpointError(
            f"{directory} holds other trained tensors than this run; give the flags that it was made with: {made or 'see args.json'}"
        )


def _compare_base(directory: Path, saved: str, now: str) -> None:
    if saved != now:
        base = saved_flags(directory).get("model")
        raise CheckpointError(f"{directory} was made from another base model than --model; give the one of its run{f' ({base})' if base else ''}")


def saved_flags(directory: Path) -> dict[str, Any]:
    """args.json of a checkpoint; empty where there is none that can be read."""
    try:
        content = json.loads((directory / "args.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
