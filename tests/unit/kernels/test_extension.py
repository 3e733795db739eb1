"""The compiled kernels load, or say why not; the choice between them and the references."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mswift.errors import ConfigError
from mswift.kernels import choice, cuda, cuda_abi, cuda_build, extension

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


STALE = """
from pathlib import Path
from mswift.kernels import extension
extension._SCHEMAS = Path({path!r})
extension._REASON = extension._load()
extension._ISA = "none" if extension._REASON else extension._ISA
from mswift.kernels import choice, elementwise, linear_softmax
import torch
print(extension.missing())
print(choice.announcement(), choice.announcement("cuda"))
print(elementwise.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).sum().round().item())
"""


@pytest.mark.skipif(extension.missing() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("change", [('m.def("rms_norm(Tensor x', 'm.def("rms_norm(Tensor more, Tensor x'), ("rotate(", "turn(")])
def test_a_library_of_other_sources_is_left_alone_with_one_line(tmp_path: Path, change: tuple[str, str]) -> None:
    """An operator that the sources have and the library lacks, or that takes other arguments in it: plain torch runs."""
    source = (ROOT / "csrc" / "ops.cpp").read_text(encoding="utf8")
    assert source.count(change[0]) == 1
    changed = tmp_path / "ops.cpp"
    changed.write_text(source.replace(*change), encoding="utf8")
    found = run(STALE.format(path=str(changed)))
    name = "mswift::rms_norm" if "more" in change[1] else "mswift::turn"
    assert found.startswith(f"they are from another version of the sources, which differ in {name}; run make setup\nplain torch (they are")
    assert found.count("warning: ") == 1
    assert "8.0" in found
    assert "Traceback" not in found


def test_cuda_kernels_of_other_sources(tmp_path: Path) -> None:
    library = ctypes.CDLL(None)  # the functions of this process, none of them ours
    with pytest.raises(RuntimeError, match=r"no mswift_\w+ in it: the compiled kernels are from another version"):
        cuda_abi.functions(library)
    assert cuda_build.stale(tmp_path) is None, "nothing is there"
    (tmp_path / cuda_build.LIBRARY).write_bytes(b"")
    assert "another version of the sources; run make setup" in (cuda_build.stale(tmp_path) or "")
    (tmp_path / cuda_build.DIGEST).write_text(f"{cuda_build.digest()} 90", encoding="utf8")
    assert cuda_build.stale(tmp_path) is None


def test_a_device_without_its_kernels_is_told_of_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("MSWIFT_CUDA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_FOLDER", tmp_path)
    cuda._tell.cache_clear()
    with caplog.at_level("WARNING"):
        assert [cuda.missing() for _ in range(3)] == ["they were not built: install with nvcc on PATH or CUDA_HOME set"] * 3
    assert [record.message for record in caplog.records] == [
        "the CUDA kernels are not in use (they were not built: install with nvcc on PATH or CUDA_HOME set); "
        "plain torch is, which is slower and gives the same results"
    ]
    if extension.missing() is None:
        assert choice.announcement("cuda") == f"plain torch ({cuda.missing()})"


def test_cuda_kernels_that_were_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MSWIFT_CUDA=1 where they cannot run is an error, of a command and of a call; a device without them is not enough, nor they without a device."""
    monkeypatch.setattr(cuda, "_FOLDER", tmp_path)
    monkeypatch.setattr(extension, "missing", lambda: None)
    cuda._stale.cache_clear()
    for set_to in ("0", "auto"):
        monkeypatch.setenv("MSWIFT_CUDA", set_to)
        cuda.demand()
    monkeypatch.setenv("MSWIFT_CUDA", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for ask in (cuda.demand, cuda.missing):
        with pytest.raises(
            ConfigError, match=r"^MSWIFT_CUDA=1: the CUDA kernels cannot run here \(they were not built: .*\); unset MSWIFT_CUDA to go on"
        ):
            ask()
    (tmp_path / cuda_build.LIBRARY).write_bytes(b"")
    (tmp_path / cuda_build.DIGEST).write_text(f"{cuda_build.digest()} 90", encoding="utf8")
    cuda._stale.cache_clear()
    cuda.demand()
    assert cuda.missing() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"cannot run here \(no CUDA device\)"):
        cuda.missing()
    cuda._stale.cache_clear()


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
    with pytest.raises(ConfigError, match=r"got refrence \(did you mean reference\?\); wanted auto, reference, or some of one, two"):
        choice.select("refrence")
    assert choice.selected() == "one,two"
    choice.select("auto")
    assert choice.compiled("one", single)
    monkeypatch.setattr(extension, "missing", lambda: "not built")
    assert choice.hindrance("one", single) == "not built"
    with pytest.raises(ConfigError, match=r"--kernels one,two: no compiled kernel can run here \(not built\); --kernels auto"):
        choice.select("two,one")
    choice.select("reference")
    choice.select("auto")
    assert all(row[1] == "reference" for row in choice.table())
