"""setup.py where something is missing: the package goes in without kernels and says why, or fails in one line where they were asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def build(folder: Path, *tools: str, **env: str) -> tuple[int, str, str]:
    """Build with no other programs on PATH than `tools`: the exit status, the last line on stderr, what the package is told of its kernels."""
    programs = folder / "bin"
    programs.mkdir()
    for tool in tools:
        (programs / tool).symlink_to(shutil.which(tool) or "/bin/false")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "MSWIFT_", "CXX"))}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    done = subprocess.run(command, cwd=ROOT, env={**environment, "PATH": str(programs), **env}, capture_output=True, text=True, check=False)
    note = folder / "lib" / "mswift" / "kernels" / "lib" / "build.txt"
    return done.returncode, (done.stderr.splitlines() or [""])[-1], note.read_text(encoding="utf8").strip() if note.is_file() else ""


@pytest.mark.parametrize(
    ("env", "reason"),
    [({}, "no C++ compiler (c++)"), ({"MSWIFT_BUILD": "0"}, "MSWIFT_BUILD=0"), ({"CXX": "clang-99 -O2"}, "no C++ compiler (clang-99)")],
)
def test_the_package_goes_in_without_kernels_and_says_why(tmp_path: Path, env: dict[str, str], reason: str) -> None:
    code, _, note = build(tmp_path, **env)
    assert code == 0
    assert note == reason
    assert not list(tmp_path.glob("lib/**/*.so"))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MSWIFT_BUILD": "1"}, "error: MSWIFT_BUILD=1, but no C++ compiler (c++)"),
        ({"MSWIFT_CUDA": "1"}, "error: MSWIFT_CUDA=1, but no C++ compiler (c++)"),
        ({"MSWIFT_CUDA": "1", "MSWIFT_BUILD": "0"}, "error: MSWIFT_CUDA=1, but MSWIFT_BUILD=0"),
    ],
)
def test_kernels_that_were_asked_for_fail_in_one_line(tmp_path: Path, env: dict[str, str], message: str) -> None:
    code, line, note = build(tmp_path, **env)
    assert code == 1
    assert line == message
    assert note == ""


def leave(folder: Path, *names: str) -> Path:
    """What an earlier build has left in a package."""
    library = folder / "lib" / "mswift" / "kernels" / "lib"
    library.mkdir(parents=True)
    for name in names:
        (library / name).write_bytes(b"old")
    return library


BUILT = ("libmswift_cpu.so", "libmswift_cuda.so", "ptxas.txt", "sources.txt")


def test_nothing_of_an_earlier_build_is_left_where_nothing_is_built(tmp_path: Path) -> None:
    """It would be loaded, and go into a wheel, while the note says that it is not there."""
    library = leave(tmp_path, *BUILT)
    assert build(tmp_path, MSWIFT_BUILD="0")[2] == "MSWIFT_BUILD=0"
    assert [path.name for path in library.iterdir()] == ["build.txt"]
    (tmp_path / "failed").mkdir()
    library = leave(tmp_path / "failed", *BUILT)
    assert build(tmp_path / "failed", "false", CXX="false", CC="false")[2].startswith("the compiler failed: ")
    assert [path.name for path in library.iterdir()] == ["build.txt"]


@pytest.mark.parametrize("cuda", ["0", "auto"])
def test_no_old_kernels_for_cuda_beside_new_ones_for_the_cpu(tmp_path: Path, cuda: str) -> None:
    library = leave(tmp_path, *BUILT)
    code = "import runpy, sys; from pathlib import Path; sys.argv = ['setup.py', '--name']; "
    code += "made = runpy.run_path('setup.py'); print(made['build_cuda'](Path(sys.orig_argv[-1])))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {"MSWIFT_CUDA": cuda, "MSWIFT_BUILD": "0", "PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(library.parents[1])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("no CUDA kernels (")
    assert [path.name for path in library.iterdir()] == ["libmswift_cpu.so"]


@pytest.mark.skipif(shutil.which("false") is None, reason="no program that only fails")
def test_a_compiler_that_fails(tmp_path: Path) -> None:
    (tmp_path / "auto").mkdir()
    code, _, note = build(tmp_path / "auto", "false", CXX="false", CC="false")
    assert code == 0
    assert note.startswith("the compiler failed: ")
    assert "\n" not in note
    (tmp_path / "asked").mkdir()
    code, line, _ = build(tmp_path / "asked", "false", CXX="false", CC="false", MSWIFT_BUILD="1")
    assert code != 0
    assert line.strip()


def test_nothing_is_compiled_for_the_machine_at_hand() -> None:
    """A wheel runs on every x86-64: code for more is chosen at run time."""
    texts = [
        path.read_text(encoding="utf8")
        for path in (ROOT / "setup.py", ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / "mswift").rglob("*build*.py"))
    ]
    flags = [flag for text in texts for flag in re.findall(r"-m(?:arch|tune|cpu|avx|fma|amx)[\w=.-]*", text)]
    assert flags == []
    assert len(texts) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [True, False])
def test_a_wheel_has_the_kernels_with_and_without_build_isolation(tmp_path: Path, isolation: bool) -> None:
    """Isolated, torch is not in the build environment: that of the environment to install into is built against."""
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    leave(source / "build", "libmswift_cuda.so")
    (source / "mswift" / "kernels" / "lib").mkdir()
    (source / "mswift" / "kernels" / "lib" / "libmswift_cuda.so").write_bytes(b"old")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), *([] if isolation else ["--no-build-isolation"]), "."]
    done = subprocess.run(command, cwd=source, env={**os.environ, "MSWIFT_CUDA": "0"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("mswift-*.whl")
    assert wheel.name.endswith("linux_x86_64.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mswift/kernels/lib/libmswift_cpu.so" in names
    assert "mswift/kernels/lib/libmswift_cuda.so" not in names
