"""Every family, in every variant that its config can express, computes what transformers computes: logits, loss, each gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

from mswift.families import families
from tests.parity.cases import CASES, every_case, options_of
from tests.parity.checks import check_against_transformers
from tests.tiny import make_model


def test_every_registered_family_has_tiny_configs() -> None:
    assert {family.name for family in families()} == set(CASES)
    for family in families():
        model = make_model(family.name, **CASES[family.name]["plain"])
        assert type(model).__name__ in family.architectures


@pytest.mark.parametrize("case", every_case())
def test_the_tiny_models_have_no_constant_tensor(case: str) -> None:
    family, changes = options_of(case)
    for name, parameter in make_model(family, **changes).named_parameters():
        assert parameter.unique().numel() > 0.9 * min(parameter.numel(), 1000), f"{name} is not random, so a skipped one would not show"


@pytest.mark.parametrize("case", every_case())
def test_logits_loss_and_gradients_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    check_against_transformers(case, 1, {}, tmp_path)
