"""The help of flags: complete, and wrapped."""

from __future__ import annotations

import pytest

from mswift.config import InferConfig, SftConfig
from mswift.config.help import flags_help, paragraphs


@pytest.mark.parametrize("width", [44, 72, 100, 140])
def test_lines_fit_and_nothing_is_missing(width: int) -> None:
    text = flags_help(SftConfig, width)
    assert max(map(len, text.splitlines())) <= width
    for name, flag in SftConfig.flags().items():
        assert f"--{name}" in text.split()
        assert " ".join(flag.help.split()[:2]) in " ".join(text.split())
    for section in SftConfig.sections():
        assert f"{section}: " in text


def test_choices_and_defaults_are_shown() -> None:
    text = " ".join(flags_help(SftConfig, 100).split())
    assert "--tuner_type lora|full Train a LoRA adapter or every weight [lora]" in text
    assert "--lora_rank N Rank of the adapter [8]" in text
    assert "--learning_rate X Highest learning rate [1e-4 with lora, 1e-5 with full]" in text
    assert "--plot true|false Draw curves of the run as PNG files [true]" in text
    assert "--result_path FILE" in flags_help(InferConfig, 100)


def test_paragraphs() -> None:
    text = paragraphs({"A": "word " * 20, "A_VERY_LONG_NAME_INDEED_FOR_A_COLUMN": "x"}, 50)
    lines = text.splitlines()
    assert lines[0].startswith("  A     ")
    assert max(map(len, lines)) <= 50
    assert lines[-2].strip() == "A_VERY_LONG_NAME_INDEED_FOR_A_COLUMN"
    assert lines[-1].strip() == "x"
