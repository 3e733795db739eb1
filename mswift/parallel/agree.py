"""How ranks go on together or fail together when any of them may fail alone, as on a full disk."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from mswift.errors import CheckpointError, MswiftError, one_line


def attempt(action: Callable[[], None]) -> Exception | None:
    """The error of an action that may fail on one rank only, so that all ranks can `agree` on it."""
    try:
        action()
    except (OSError, RuntimeError, ValueError) as error:
        return error
    return None


def agree(error: BaseException | None, what: str) -> None:
    """Raise on every rank when something failed on any of them. Collective.

    Raises:
        CheckpointError: ``what`` failed, with the first failing rank's reason.
    """
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if error is None else reason_of(error))
    failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        rank, reason = failed[0]
        where = f" on rank {rank}" if len(reasons) > 1 else ""
        raise CheckpointError(f"{what} failed{where}: {reason}") from error


def reason_of(error: BaseException) -> str:
    """An error in a line; the kind of one that is neither ours nor the system's says more than its text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) if isinstance(error, MswiftError) else f"{type(error).__name__}: {one_line(error)}"
