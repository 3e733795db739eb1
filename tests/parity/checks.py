"""The check of a whole model against transformers, in one layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run
from tests.parity.cases import options_of
from tests.parity.ranks import measure
from tests.parity.reference import distance, last_stage, load_tensors, measure_reference, random_batches, written_gradients
from tests.tiny import make_model


def check_against_transformers(case: str, world: int, sizes: dict[str, Any], folder: Path) -> None:
    """Logits, loss and the gradient of every tensor of one tiny model, fp32, in the layout `sizes` of `world` processes."""
    family, changes = options_of(case)
    model = make_model(family, **changes)
    model.save_pretrained(folder / "model")
    batches = random_batches()
    run = Run(folder / "model", max_grad_norm=0.0, **sizes)
    ranks = run_distributed(measure, world, run, batches, folder / "gradients")
    expected = measure_reference(model, batches)
    assert distance(last_stage(ranks, sizes.get("tp", 1)), expected.logits) < 1e-4
    gradients, wanted = load_tensors(folder / "gradients"), written_gradients(model)
    assert set(gradients) == set(wanted)
    for name, gradient in wanted.items():
        if name.endswith("e_score_correction_bias"):  # a buffer, which is not trained
            continue
        assert gradient.norm() > 0, f"{name} has no effect, so nothing was compared"
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    whole = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    for rank in ranks:
        assert rank.loss == pytest.approx(expected.loss, rel=1e-5)
        assert rank.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert rank.grad_norm == pytest.approx(whole, rel=1e-6), "padding has a gradient, or a tensor was counted twice"
