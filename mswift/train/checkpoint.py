"""Training checkpoints: one folder holds everything, written by every rank, made visible by one rename.

``checkpoint-N/`` is a PEFT adapter (or a Hugging Face model, for full training) that other programs load as it is; its ``resume/`` folder
holds what only a resumed run needs: megatron-core's distributed checkpoint of the trained weights and the optimizer, and `RESUME_FILE`.
Random numbers and the position in the data follow from the step, so there is nothing more to keep.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from mswift.engines.base import Engine
from mswift.errors import CheckpointError
from mswift.log import get_logger, is_main_process
from mswift.parallel.agree import agree, attempt
from mswift.train.folders import (
    RESUME_DIR,
    STATE_DIR,
    ResumePoint,
    RunIdentity,
    check_identity,
    damaged,
    list_checkpoints,
    read_resume_point,
    state_files,
)

logger = get_logger(__name__)


class CheckpointWriter:
    """Saves an engine's state under an output directory, keeps the newest `keep`."""

    def __init__(
        self,
        engine: Engine,
        identity: RunIdentity,
        write_model: Callable[[Path], None],
        *,
        keep: int | None = None,
        notes: Callable[[int], dict[str, object]] | None = None,
    ) -> None:
        """`notes` of a step are written into `RESUME_FILE`, for people."""
        self.engine, self.identity, self.write_model, self.keep, self.notes = engine, identity, write_model, keep, notes

    def save(self, output_dir: Path, step: int) -> Path:
        """Write ``checkpoint-<step>``; all ranks call it.

        Raises:
            CheckpointError: on every rank if any rank could not write; what was there before is untouched.
        """
        target = output_dir / f"checkpoint-{step}"
        try:
            self._write(target, output_dir / f".{target.name}.incomplete", step)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; earlier checkpoints are whole: mend that, then add --resume_from_checkpoint auto") from error
        self._forget_old(output_dir)
        return target

    def _write(self, target: Path, draft: Path, step: int) -> None:
        what = f"saving {target}"
        if is_main_process():
            shutil.rmtree(draft, ignore_errors=True)
        agree(attempt(lambda: self._require_space(target.parent)), what)
        try:
            agree(attempt(lambda: self.write_model(draft)), what)
            self._write_resume(draft, step, what)
            agree(attempt(lambda: _publish(draft, target)), what)
        except BaseException:
            if is_main_process():
                shutil.rmtree(draft, ignore_errors=True)
            raise

    def _require_space(self, output_dir: Path) -> None:
        """Two moments, the master weight and the weight twice for every trained element, before a byte is written."""
        elements = torch.tensor([sum(self.engine.trained_elements())], dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(elements)
        if is_main_process():
            layout = self.engine.groups.layout
            needed = 16 * int(elements[0]) // (layout.dp * layout.cp)  # replicas are written once
            output_dir.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(output_dir).free
            if free < needed:
                raise CheckpointError(f"{free / 2**20:.1f} MiB are free there, {needed / 2**20:.1f} MiB needed")

    def _write_resume(self, draft: Path, step: int, what: str) -> None:
        from mswift.conversion.dist_checkpoint import save_state

        save_state(self.engine.sharded_state(loading=False), draft / RESUME_DIR / STATE_DIR, what)

        def write_point() -> None:
            if is_main_process():
                layout = self.engine.groups.layout
                ResumePoint(step, self.identity, state_files(draft)).write(
                    draft, world=layout.world, layout=layout.describe(), **(self.notes(step) if self.notes else {})
                )

        agree(attempt(write_point), what)

    def _forget_old(self, output_dir: Path) -> None:
        if self.keep is not None and is_main_process():
            for path in list_checkpoints(output_dir)[: -self.keep]:
                shutil.rmtree(path)


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
    from mswift.conversion.dist_checkpoint import load_state

    point = read_resume_point(directory)
    check_identity(directory, point.identity, identity)
    saved, now = point.identity, identity
    if (saved.data, saved.global_batch_size, saved.seed) != (now.data, now.global_batch_size, now.seed):
        logger.warning("%s: the data, global_batch_size or seed changed since; rows may be seen twice or not at all in this epoch", directory)
    try:
        state = load_state(engine.sharded_state(loading=True), directory / RESUME_DIR / STATE_DIR)
    except CheckpointError as error:
        raise damaged(directory, str(error)) from error
    engine.load_state(state)
    return point.step
