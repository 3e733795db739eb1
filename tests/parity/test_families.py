"""Every family, in every variant that its config can express, computes what transformers computes: logits, loss, each gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mswift.families import families
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run
from tests.parity.cases import CASES, every_case, options_of
from tests.parity.ranks import measure
from tests.parity.reference import distance, last_stage, load_tensors, measure_reference, random_batches
from tests.tiny import make_model

LAYOUTS = {"tp1": (1, {}), "tp2": (2, {"tp": 2})}


def test_every_registered_family_has_a_tiny_config() -> None:
    assert {family.name for family in families()} == set(CASES)
    for family in families():
        model = make_model(family.name)
        assert type(model).__name__ in family.architectures
        assert all(variants for variants in CASES.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", every_case())
def test_logits_loss_and_gradients_equal_those_of_transformers(case: str, layout: str, tmp_path: Path) -> None:
    check_case(case, *LAYOUTS[layout], tmp_path)


def check_case(case: str, world: int, sizes: dict[str, int], folder: Path) -> None:
    family, changes = options_of(case)
    model = make_model(family, **changes)
    model.save_pretrained(folder / "model")
    batches = random_batches()
    run = Run(folder / "model", max_grad_norm=0.0, **sizes)
    ranks = run_distributed(measure, world, run, batches, folder / "gradients")
    expected = measure_reference(model, batches)
    worst = distance(last_stage(ranks), expected.logits)
    import os; open(os.environ.get("PARITY_LOG", os.devnull), "a").write(f"{case} {sizes} logits {worst:.2e} of {expected.logits.std():.2f} loss {abs(ranks[0].loss-expected.loss)/expected.loss:.2e} norm {abs(ranks[0].grad_norm/expected.grad_norm-1):.2e} {expected.grad_norm:.2f}\n")
    assert worst < 1e-4
    for rank in ranks:
        assert rank.loss == pytest.approx(expected.loss, rel=1e-5)
        assert rank.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    gradients = load_tensors(folder / "gradients")
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    g = 0.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0, f"{name} is not used"
        g = max(g, ((gradients[name] - parameter.grad).norm()/ parameter.grad.norm()).item())
        assert (gradients[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm() , name
    open(os.environ.get("PARITY_LOG", os.devnull), "a").write(f"   worst gradient {g:.2e}\n")
