"""The public interface: the list of flags is pinned, and a command gets what was written."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from mswift import cli
from mswift.config import CONFIGS, Config, SftConfig
from mswift.errors import DataError

PINNED = Path(__file__).with_name("flags.txt")


def listing() -> str:
    """Every flag of every verb with its values and its default."""
    return "".join(
        f"{verb} --{flag.name} {flag.placeholder()} [{flag.shown_default()}]\n"
        for verb, config in CONFIGS.items()
        for flag in config.flags().values()
    )


def test_the_list_of_flags_is_pinned() -> None:
    """Flags are a public interface. After a change on purpose: python tests/cli/test_arguments.py"""
    assert listing() == PINNED.read_text(encoding="utf8")
    assert listing().count("\n") == sum(len(config.flags()) for config in CONFIGS.values())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configs that reached the command, which fails for the model ``broken``."""
    reached: list[Config] = []

    def sft(config: SftConfig) -> None:
        reached.append(config)
        if config.model.model == "broken":
            raise DataError("row 7\nis bad")
        if config.model.model == "stopped":
            raise KeyboardInterrupt
        if config.model.model == "ours":
            raise ZeroDivisionError

    module = types.ModuleType("mswift.commands.sft")
    module.sft = sft  # type: ignore[attr-defined]
    module.check = lambda config, world: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mswift.commands.sft", module)
    for name in ("NPROC_PER_NODE", "NNODES", "RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return reached


def test_a_command_gets_its_config(calls: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--model", "m", "--dataset", "d", "--lr", "1e-5", "--tuner_type", "full", "--lora_rank", "4"]) == 0
    (config,) = calls
    assert isinstance(config, SftConfig)
    assert (config.model.model, config.optim.learning_rate) == ("m", 1e-5)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["read as: --lr -> --learning_rate", "--lora_rank has no effect: --tuner_type is full"]


def test_only_rank_0_speaks(calls: list[Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sft", "--model", "m", "--dataset", "d", "--lr", "1e-5"]) == 0
    assert cli.main(["sft", "--model", "m", "--dataset", "d", "--zzz"]) == 2
    assert capsys.readouterr().err == ""
    assert cli.main(["sft", "--model", "broken", "--dataset", "d"]) == 2
    assert capsys.readouterr().err == "[rank 1] error: row 7 is bad\n"
    assert len(calls) == 2


def test_exit_codes(calls: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--model", "broken", "--dataset", "d"]) == 2
    assert capsys.readouterr().err == "error: row 7 is bad\n"
    assert cli.main(["sft", "--model", "stopped", "--dataset", "d"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        cli.main(["sft", "--model", "ours", "--dataset", "d"])
    assert cli.main(["sft", "--model", "m", "--dataset", "d", "--tensor_model_parallel_size", "2"]) == 2
    assert "NPROC_PER_NODE=2" in capsys.readouterr().err
    assert len(calls) == 3


def test_the_env_block_reaches_the_process(calls: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSWIFT_TEST_SET", "before")
    monkeypatch.delenv("MSWIFT_TEST_NEW", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text("ENV: {MSWIFT_TEST_SET: after, MSWIFT_TEST_NEW: 3}\nmodel: m\ndataset: d\n")
    assert cli.main(["sft", str(path)]) == 0

    assert os.environ["MSWIFT_TEST_SET"] == "before"
    assert os.environ.pop("MSWIFT_TEST_NEW") == "3"
    assert len(calls) == 1


if __name__ == "__main__":
    PINNED.write_text(listing(), encoding="utf8")
