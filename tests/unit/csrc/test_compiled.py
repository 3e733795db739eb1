"""csrc/cuda under nvcc: every architecture compiles, no kernel spills or passes its budget, the library says what went wrong."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mswift.kernels import cuda_abi as abi
from tests.unit.csrc.emulator import ROOT

cuda = runpy.run_path(str(ROOT / "mswift" / "kernels" / "cuda_build.py"))
needs_nvcc = pytest.mark.skipif(cuda["find_nvcc"]() is None, reason="no nvcc: the CUDA kernels cannot be compiled here")


class Budget(NamedTuple):
    """At most so many registers a thread, of blocks of 256 threads (288 for Hopper), and bytes of static shared memory."""

    registers: int
    shared: int


STATIC_SHARED, DYNAMIC_SHARED, MULTIPROCESSOR_SHARED = 12 * 1024, 48 * 1024, 164 * 1024
REST = Budget(64, STATIC_SHARED)
BUDGETS = {
    # one block fills a multiprocessor, which counts its nine warps as three warpgroups: 65,536 / 384, in eights
    "linear_hopper": Budget(168, 0),
    # two blocks share a multiprocessor's 65,536 registers
    **dict.fromkeys(("linear", "outer", "head_tiles"), Budget(128, STATIC_SHARED)),
    # one block fills it: the gradients of 64 rows lie in its registers
    "head_rows": Budget(255, 36 * 1024),
    # one block fills it as well: a tile of logits and one of the gradient
    "head_group": Budget(255, 14 * 1024),
}


class Use(NamedTuple):
    kernel: str
    architecture: str
    registers: int
    spilled: int
    stack: int
    shared: int


def parse(report: str) -> list[Use]:
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(pattern.finditer(report))
    names = [entry["name"] for entry in found]
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    uses = []
    for entry, name in zip(found, names):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        plain = re.sub(r"\((?:anonymous namespace\)::|Mode\)|int\)|bool\))", "", name)
        short = re.sub(r"^void |\(.*\)$", "", plain)
        numbers = (int(entry["registers"]), int(entry["stores"]) + int(entry["loads"]), int(entry["stack"]), int(shared[1]) if shared else 0)
        uses.append(Use(short, entry["arch"], *numbers))
    return uses


def faults(uses: list[Use], report: str = "") -> list[str]:
    found = re.findall(r"\(C75\d\d\)[^\n]*", report)  # wgmma made to wait, where the kernel did not ask for it
    for use in uses:
        budget = next((of for name, of in BUDGETS.items() if re.search(rf"(^|\d){name}", use.kernel)), REST)
        if use.spilled or use.stack:
            found.append(f"{use.kernel} for {use.architecture} spills {use.spilled} bytes, stack {use.stack}")
        if use.registers > budget.registers:
            found.append(f"{use.kernel} for {use.architecture}: {use.registers} registers, at most {budget.registers}")
        if use.shared > budget.shared:
            found.append(f"{use.kernel} for {use.architecture}: {use.shared} bytes of shared memory, at most {budget.shared}")
    return found


@pytest.fixture(scope="module")
def library() -> Path:
    """That of the installed package if it was made from these sources, else a new one."""
    for folder in (ROOT / "mswift" / "kernels" / "lib", ROOT / ".cache" / f"cuda-{cuda['digest']()[:16]}"):
        mark = folder / cuda["DIGEST"]
        if mark.is_file() and mark.read_text(encoding="utf8").split() == [cuda["digest"](), *cuda["architectures"](cuda["find_nvcc"]())]:
            return folder / cuda["LIBRARY"]
    return cuda["build"](cuda["find_nvcc"](), folder)


@needs_nvcc
def test_no_kernel_spills_or_passes_its_budget(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = (library.parent / cuda["REPORT"]).read_text(encoding="utf8")
    uses = parse(report)
    with capsys.disabled():
        print(f"\n{'kernel':70} {'for':7} {'registers':>9} {'spilled':>8} {'shared':>7}")
        for use in sorted(uses):
            print(f"{use.kernel[:70]:70} {use.architecture:7} {use.registers:9} {use.spilled:8} {use.shared:7}")
    assert faults(uses, report) == []
    kernels = {use.kernel for use in uses}
    sources = "".join(path.read_text(encoding="utf8") for path in cuda["SOURCE"].glob("*.cu*"))
    assert len(kernels) >= sources.count("__global__"), "every kernel is in the report"
    asked = cuda["architectures"](cuda["find_nvcc"]())
    assert {use.architecture for use in uses if "hopper" not in use.kernel} == {f"sm_{arch}" for arch in asked}
    assert {use.architecture for use in uses if "hopper" in use.kernel} == ({"sm_90a"} if {"90", "90a"} & set(asked) else set())
    assert 2 * (STATIC_SHARED + DYNAMIC_SHARED) <= MULTIPROCESSOR_SHARED, "two blocks of a product share a multiprocessor"


def test_the_budget_finds_what_it_is_for() -> None:
    report = """ptxas info    : Compiling entry function '_Z10head_tilesv' for 'sm_90'
ptxas info    : Function properties for _Z10head_tilesv
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16384 bytes smem
ptxas info    : Compiling entry function '_Z4ropev' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers"""
    found = faults(parse(report))
    assert len(found) == 3
    serial = "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized due to program dependence"
    assert faults(parse(report), f"{serial}\n{report}") == [serial[serial.index("(") :], *found]
    assert "spills 8 bytes" in found[0]
    assert "16384 bytes of shared memory" in found[1]
    assert "72 registers" in found[2]


@needs_nvcc
def test_the_library_reports_errors_where_there_is_no_device(library: Path) -> None:
    """With a device the launch of an impossible grid is refused; without one every launch is."""
    loaded = ctypes.CDLL(str(library))
    functions = abi.functions(loaded)
    loaded.mswift_cuda_error.restype = ctypes.c_char_p
    code = functions["mswift_rms_norm_forward"](0, None, None, None, None, None, None, 2**40, 2**30, 1e-6, 0, None)
    assert code not in (0, abi.UNSUPPORTED)
    assert loaded.mswift_cuda_error(code).decode().strip()
    assert functions["mswift_rope"](0, None, None, None, None, 1, 1, 8, 7, 1, 8, 8, 8, 8, 0, 1, None) == abi.UNSUPPORTED
    assert b"does not do" in loaded.mswift_cuda_error(abi.UNSUPPORTED)


def test_the_declared_interface_is_that_of_the_header() -> None:
    header = (ROOT / "csrc" / "cuda" / "mswift_cuda.h").read_text(encoding="utf8")
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    declared = dict(re.findall(r"\bint (mswift_\w+)\(([^)]*)\);", code))
    letters = {"int": "i", "int64_t": "l", "float": "f"}
    for name, parameters in declared.items():
        kinds = ["p" if "*" in parameter else letters[parameter.replace("const ", "").split()[0]] for parameter in parameters.split(",")]
        assert "".join(kinds) == abi.SIGNATURES[name], name
    assert set(declared) == set(abi.SIGNATURES)
    for name, structure in (("linear_args", abi.Linear), ("outer_args", abi.Outer), ("head", abi.Head), ("dropout", abi.Dropout)):
        body = re.search(rf"typedef struct {{([^}}]*)}} mswift_{name};", code)
        assert body is not None
        fields = [field for line in body[1].split(";") for field in re.findall(r"(\w+)\s*(?:,|$)", line.strip())]
        assert fields == [field[0] for field in structure._fields_], name


def test_a_build_that_must_have_cuda_fails_in_one_line_without_nvcc(tmp_path: Path) -> None:
    for tool in ("c++", "g++", "sh", "uname"):
        found = shutil.which(tool)
        if found:
            (tmp_path / tool).symlink_to(found)
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    environment.update(PATH=str(tmp_path), MSWIFT_CUDA="1")
    done = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: MSWIFT_CUDA=1, but there is no nvcc")
    assert "Traceback" not in done.stderr
