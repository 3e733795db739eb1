"""Compiles csrc/cuda with nvcc into one library without torch, for several architectures at once; setup.py and the tests run it.

By itself: python mswift/kernels/cuda_build.py FOLDER    writes FOLDER/libmswift_cuda.so and FOLDER/ptxas.txt, what ptxas says of every kernel

MSWIFT_CUDA_ARCHS, by default "80 90 100", chooses architectures; code for the last of them also goes in as PTX, for later devices. With 90,
*_hopper.cu is compiled for sm_90a.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda"  # of a source tree; an installed package has none
LIBRARY, REPORT, DIGEST = "libmswift_cuda.so", "ptxas.txt", "sources.txt"
DEFAULT_ARCHITECTURES = "80 90 100"
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=default", "-Xptxas", "-v", "--ptxas-options=-warn-spills")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, else the one on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            found = shutil.which(str(Path(os.environ[name]) / "bin" / "nvcc"))
            if found:
                return found
    return shutil.which("nvcc")


def architectures(nvcc: str) -> list[str]:
    """Those asked for that this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    wanted = os.environ.get("MSWIFT_CUDA_ARCHS", DEFAULT_ARCHITECTURES).replace(";", " ").replace(",", " ").split()
    found = [arch for arch in wanted if f"compute_{arch.rstrip('af')}" in known]
    if not found:
        raise RuntimeError(f"nvcc knows none of the architectures {' '.join(wanted)}; it knows {' '.join(known)}")
    return found


def targets(chosen: list[str], source: Path) -> list[str]:
    """nvcc's flags for what `source` is compiled for; for Hopper's own instructions sm_90a alone, where sm_90 is asked for."""
    if source.stem.endswith("_hopper") and {"90", "90a"} & set(chosen):
        return ["-DMSWIFT_SM90A", "-gencode=arch=compute_90a,code=sm_90a"]
    return [*(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen), f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def digest() -> str:
    """Of the sources that the library is made of."""
    files = sorted(path for path in (*SOURCE.iterdir(), *SOURCE.parent.joinpath("common").iterdir()) if path.suffix in (".cu", ".cuh", ".h"))
    return hashlib.sha256("".join(path.name + path.read_text(encoding="utf8") for path in files).encode()).hexdigest()


def stale(folder: Path) -> str | None:
    """Why the library in `folder` does not belong to the sources beside this package; None: it does, or there are none to compare."""
    mark = folder / DIGEST
    if not SOURCE.is_dir() or not (folder / LIBRARY).is_file():
        return None
    same = mark.is_file() and mark.read_text(encoding="utf8").split()[:1] == [digest()]
    return None if same else "they are from another version of the sources; run make setup"


def build(nvcc: str, folder: Path) -> Path:
    """Compile and link; returns the library.

    Raises:
        RuntimeError: nvcc failed; its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = architectures(nvcc)

    def run(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed: {' '.join((done.stderr + done.stdout).split())[-600:]}")
        return done.stderr + done.stdout

    def compile_one(source: Path) -> str:
        return run(*FLAGS, *targets(chosen, source), "-c", str(source), "-o", str(folder / f"{source.stem}.o"))

    # The longest first, so that no core waits at the end.
    sources = sorted(SOURCE.glob("*.cu"), key=lambda path: path.stem not in ("head_group", "head", "linear", "linear_hopper", "quantised", "norm"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    try:
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            report = "".join(pool.map(compile_one, sources))
        run("-shared", "-cudart", "static", *targets(chosen, SOURCE), *map(str, objects), "-o", str(folder / LIBRARY))
    finally:
        for path in objects:
            path.unlink(missing_ok=True)
    (folder / REPORT).write_text(report, encoding="utf8")
    (folder / DIGEST).write_text(f"{digest()} {' '.join(chosen)}\n", encoding="utf8")
    return folder / LIBRARY


if __name__ == "__main__":
    compiler = find_nvcc()
    if compiler is None or len(sys.argv) != 2:
        raise SystemExit(__doc__ if compiler else "error: no nvcc: put it on PATH or set CUDA_HOME")
    print(build(compiler, Path(sys.argv[1])))
