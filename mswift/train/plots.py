"""Pictures of a run, from its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_training(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with the loss (and the validation loss) above and the learning rate below, over the optimizer steps.

    Args:
        records: rows of ``logging.jsonl``: ``step`` with ``loss`` and ``learning_rate``, or ``step`` with ``eval_loss``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [row for row in records if "loss" in row]
    validation = [row for row in records if "eval_loss" in row]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([row["step"] for row in train], [row["loss"] for row in train], marker=".", label="training loss", color="tab:blue")
    if validation:
        steps, losses = [row["step"] for row in validation], [row["eval_loss"] for row in validation]
        upper.plot(steps, losses, marker="s", label="validation loss", color="tab:orange")
    upper.set_ylabel("loss (nats per token)")
    upper.set_ylim(bottom=0)
    upper.legend()
    lower.plot([row["step"] for row in train], [row["learning_rate"] for row in train], color="tab:green")
    lower.set_ylabel("learning rate")
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
