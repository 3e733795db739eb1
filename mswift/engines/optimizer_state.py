"""An optimizer's state that was saved with trained experts spread over ranks, read where they are not, and the other way round.

megatron-core has one optimizer for what all ranks share and one for spread experts; alone, the state of one has names for keys, together
theirs have numbers. Tensors are found by the names of the weights either way and arrive in the form that is wanted; what else belongs to the
state (the step) arrives in the form that was written, beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mswift.errors import CheckpointError


def in_wanted_form(state: dict[Any, Any], optimizers: Sequence[torch.optim.Optimizer]) -> dict[Any, Any]:
    """The state of these optimizers out of one in which both forms came together; any other is given back.

    Raises:
        CheckpointError: the state of a distributed optimizer, which differs in its tensors as well.
    """
    numbered = {key: value for key, value in state.items() if isinstance(key, int)}
    named = {key: value for key, value in state.items() if not isinstance(key, int)}
    if not numbered or not named:
        return state
    several = len(optimizers) > 1
    parts, other = (list(numbered.values()), named) if several else ([named], numbered[0])
    written = _inner(other).get("state", {})
    if "common_step" not in written or not all("state" in _inner(part) for part in parts):
        now = "are" if several else "are not"
        raise CheckpointError(
            f"the checkpoint was made the other way: trained experts {now} spread over ranks in this run; "
            "resume with the expert_model_parallel_size that its args.json names"
        )
    for part, optimizer in zip(parts, optimizers, strict=True):
        inner = _inner(part)
        inner["state"]["common_step"] = written["common_step"]
        settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        inner["param_groups"] = [{**own, "params": read["params"]} for own, read in zip(settings, inner["param_groups"], strict=True)]
    return numbered if several else named


def _inner(part: dict[str, Any]) -> dict[str, Any]:
    """torch's part of the state, which one with fp32 masters keeps inside."""
    return part.get("optimizer", part)
