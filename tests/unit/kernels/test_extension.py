"""The compiled kernels load, or say why not; the choice between them and the references."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mswift.errors import ConfigError
from mswift.kernels import choice, extension

ROOT = Path(__file__).resolve().parents[3]
LEVELS = ["none", "avx2", "avx512", "avx512_bf16", "amx"]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two operators of the test's own; the setting is put back."""
    monkeypatch.setattr(choice, "_operators", {})
    choice.register("one", "sums", lambda tensor: None if tensor.dtype == torch.float32 else "wants float32")
    choice.register("two", "products", lambda tensor: None, wins=False)
    before = choice._chosen
    yield
    monkeypatch.setattr(choice, "_chosen", before)


def run(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return done.stdout.strip() + done.stderr


@pytest.mark.skipif(extension.missing() is not None, reason="the compiled kernels are not built")
def test_the_instruction_set_can_be_lowered_and_not_raised() -> None:
    assert extension.isa() in LEVELS
    assert torch.ops.mswift.built_for().split(".")[:2] == torch.__version__.split(".")[:2]
    code = "from mswift.kernels import extension; print(extension.isa())"
    for level in LEVELS:
        found = run(code, MSWIFT_ISA=level)
        assert LEVELS.index(found) == min(LEVELS.index(level), LEVELS.index(run(code)))


def test_without_the_library_there_is_one_warning(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from mswift.kernels import extension; extension._LIBRARY = Path('absent.so'); "
        "extension._REASON = extension._load(); "
        "print(extension.missing() is not None, extension.missing() == extension.missing(), extension.available())"
    )
    found = run(code)
    assert found.startswith("True True False")
    assert found.count("warning: the compiled kernels are not in use") == 1
    assert "pip install" in found
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    found = run(code.replace("absent.so", str(broken)))
    assert "built for another torch" in found
    assert "Traceback" not in found


def test_choice(operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: None)
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert choice.selected() == "auto"
    assert choice.compiled("one", single)
    assert choice.hindrance("one", double) == "wants float32"
    assert choice.hindrance("two", single) == "plain torch is as fast"
    assert choice.table() == [("one", "compiled", "sums"), ("two", "reference", "products")]
    choice.select("two")
    assert choice.compiled("two", single)
    assert choice.hindrance("one", single) == "--kernels two"
    choice.select("reference")
    assert not choice.compiled("one", single)
    assert not choice.compiled("two", single)
    assert choice.selected() == "reference"
    choice.select("one, two")
    assert choice.selected() == "one,two"
    with pytest.raises(ConfigError, match=r"got three; wanted auto, reference, or some of one, two"):
        choice.select("one,three")
    assert choice.selected() == "one,two"
    choice.select("auto")
    assert choice.compiled("one", single)
    monkeypatch.setattr(extension, "missing", lambda: "not built")
    assert choice.hindrance("one", single) == "not built"
    assert all(row[1] == "reference" for row in choice.table())
