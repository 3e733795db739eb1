"""``--kernels`` and MSWIFT_CUDA as a user gives them, in a process of its own: nothing but the command has been imported there."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import mswift.kernels
from mswift.kernels import choice, extension
from tests.cli.conftest import Lab
from tests.cli.program import assert_one_line
from tests.cli.test_errors_started import start


def names() -> list[str]:
    """Every operator, whichever module makes it known."""
    for module in pkgutil.iter_modules(mswift.kernels.__path__):
        importlib.import_module(f"mswift.kernels.{module.name}")
    return [row[0] for row in choice.table()]


@pytest.mark.skipif(extension.missing() is not None, reason="the compiled kernels are not built")
def test_every_operator_can_be_named(lab: Lab) -> None:
    every = names()
    assert {"attention", "lora_linear", "quantised_linear", "permute", "rms_norm"} <= set(every)
    outcome, _ = start(lab.sft("--kernels", ",".join(every), "--max_steps", "1"), lab.folder)
    assert outcome.code == 0, outcome.err
    here = [name for name in every if name != "permute"]  # which has a kernel for devices alone
    assert f"kernels: {', '.join(here)} compiled (" in outcome.out + outcome.err


def test_a_name_that_no_operator_has(lab: Lab) -> None:
    outcome, _ = start(lab.sft("--kernels", "lora_linaer"), lab.folder)
    assert_one_line(outcome, "--kernels: got lora_linaer (did you mean lora_linear?); wanted auto, reference, or some of attention,", "permute")


def test_cuda_kernels_where_there_is_no_device(lab: Lab) -> None:
    outcome, _ = start(lab.sft(), lab.folder, MSWIFT_CUDA="1", CUDA_VISIBLE_DEVICES="")
    assert_one_line(outcome, "MSWIFT_CUDA=1: the CUDA kernels cannot run here (", "unset MSWIFT_CUDA")
    assert not (lab.folder / "out").exists()
