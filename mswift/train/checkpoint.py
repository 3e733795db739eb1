"""Training checkpoints: one folder holds everything, written by every rank, made visible by one rename.

``checkpoint-N/`` is a PEFT adapter (or a Hugging Face model, for full training) that other programs load as it is; its ``resume/`` folder
holds what only a resumed run needs: megatron-core's distributed checkpoint of the trained weights and the optimizer, and `RESUME_FILE`.
Random numbers and the position in the data follow from the step, so there is nothing more to keep.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mswift.engines.base import Engine
from mswift.errors import CheckpointError
from mswift.log import get_logger, is_main_process

logger = get_logger(__name__)
RESUME_DIR, RESUME_FILE = "resume", "resume.json"


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


def fingerprint_model(directory: Path) -> str:
    """SHA-256 over config.json and, for every safetensors file, its size, its first 64 KiB (the header) and 64 KiB of its middle."""
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text(encoding="utf8"))
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")):
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
    """The checkpoint to resume from: None to start anew.

    Args:
        wanted: value of ``--resume_from_checkpoint``: None, ``auto`` (the newest one, if there is any) or a path.

    Raises:
        CheckpointError: the path is no checkpoint.
    """
    if wanted is None:
        return None
    if wanted == "auto":
        found = list_checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(wanted).expanduser()
    if not (path / RESUME_DIR / RESUME_FILE).is_file():
        newest = list_checkpoints(output_dir)
        hint = f"; the newest in {output_dir} is {newest[-1].name}" if newest else ""
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted}: {path / RESUME_DIR / RESUME_FILE} is not there; wanted a checkpoint-N folder{hint}"
        )
    return path


def _agree(error: BaseException | None, what: str) -> None:
    """Raise on every rank when something failed on any of them.

    Raises:
        CheckpointError: with the first failing rank's reason.
    """
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if error is None else f"{type(error).__name__}: {error}".splitlines()[0])
    failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        rank, reason = failed[0]
        raise CheckpointError(f"{what} failed on rank {rank}: {reason}; nothing was changed, earlier checkpoints are whole") from error


class CheckpointWriter:
    """Saves an engine's state under an output directory, keeps the newest `keep`."""

    def __init__(self, engine: Engine, identity: RunIdentity, write_model: Callable[[Path], None], *, keep: int | None = None) -> None:
        self.engine, self.identity, self.write_model, self.keep = engine, identity, write_model, keep

    def save(self, output_dir: Path, step: int) -> Path:
        """Write ``checkpoint-<step>``; all ranks call it.

        Raises:
            CheckpointError: on every rank if any rank could not write; what was there before is untouched.
        """
        target = output_dir / f"checkpoint-{step}"
        draft = output_dir / f".checkpoint-{step}.incomplete"
        what = f"saving {target}"
        if is_main_process():
            shutil.rmtree(draft, ignore_errors=True)
        _agree(_attempt(lambda: self._require_space(output_dir, draft)), what)
        try:
            self.write_model(draft)
            _agree(_attempt(lambda: self._write_resume(draft / RESUME_DIR, step)), what)
            _agree(_attempt(lambda: _publish(draft, target)), what)
        except BaseException:
            if is_main_process():
                shutil.rmtree(draft, ignore_errors=True)
            raise
        self._forget_old(output_dir)
        return target

    def _require_space(self, output_dir: Path, draft: Path) -> None:
        """Master weight, two moments and the weight itself for every trained element of this rank, before a byte is written."""
        needed = sum(14 * count for count in self.engine.trained_elements())
        total = torch.tensor([needed], dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(total)
        if is_main_process():
            output_dir.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(output_dir).free
            if free < int(total[0]):
                raise OSError(f"no space left: {free / 2**20:.0f} MiB free in {output_dir}, {int(total[0]) / 2**20:.0f} MiB needed; free some")

    def _write_resume(self, directory: Path, step: int) -> None:
        from mswift.train.storage import save_state

        if is_main_process():
            (directory / "state").mkdir(parents=True)
        dist.barrier()
        save_state(self.engine.sharded_state(loading=False), directory / "state")
        if is_main_process():
            layout = {"world": self.engine.groups.layout.world, "layout": self.engine.groups.layout.describe()}
            document = {"step": step, "identity": asdict(self.identity), **layout}
            (directory / RESUME_FILE).write_text(json.dumps(document, indent=1), encoding="utf8")

    def _forget_old(self, output_dir: Path) -> None:
        if self.keep is not None and is_main_process():
            for path in list_checkpoints(output_dir)[: -self.keep]:
                shutil.rmtree(path)


def _attempt(action: Callable[[], None]) -> Exception | None:
    """The error of an action that may fail on one rank only, so that all ranks can agree on it."""
    try:
        action()
    except (OSError, RuntimeError, ValueError) as error:
        return error
    return None


def _publish(draft: Path, target: Path) -> None:
    if is_main_process():
        if target.exists():  # the same step of an earlier attempt of this run
            shutil.rmtree(target)
        draft.rename(target)


def resume(engine: Engine, directory: Path, identity: RunIdentity) -> int:
    """Give the engine the state of a checkpoint and return its step.

    Raises:
        CheckpointError: the checkpoint is of another model, of other trained tensors, or unreadable.
    """
    from mswift.train.storage import load_state

    document = json.loads((directory / RESUME_DIR / RESUME_FILE).read_text(encoding="utf8"))
    saved = RunIdentity(**document["identity"])
    _check_identity(saved, identity, directory)
    state: dict[str, Any] = {}

    def load() -> None:
        state.update(load_state(engine.sharded_state(loading=True), directory / RESUME_DIR / "state"))
        engine.load_state(state)

    error = _attempt(load)
    if error is not None:
        raise CheckpointError(f"{directory} cannot be loaded: {str(error).splitlines()[0]}; resume from an earlier checkpoint") from error
    return int(document["step"])


def _check_identity(saved: RunIdentity, now: RunIdentity, directory: Path) -> None:
    if saved.model != now.model:
        raise CheckpointError(f"{directory} was made from another base model than --model; give the model that the run was started with")
    if saved.trained != now.trained:
        raise CheckpointError(f"{directory} holds other trained tensors (rank, targets, full for LoRA, a TP size that pads heads); use its args.json")
    if (saved.data, saved.global_batch_size, saved.seed) != (now.data, now.global_batch_size, now.seed):
        logger.warning("%s: the data, global_batch_size or seed changed since; rows may be seen twice or not at all in this epoch", directory)
