"""Builds the CUDA sources against the execution model of csrc/emu and runs them on numpy arrays. No torch: it also runs under AddressSanitizer."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mswift.kernels import cuda_abi as abi

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
MODEL = sorted((ROOT / "csrc" / "emu").glob("*.cpp"))
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas")
FAILED = 9999
RESIDENT = 12
"""So many blocks does the model's device hold at once, unless told otherwise."""
COUNTERS = ("read", "written", "distinct_read", "distinct_written", "flops", "launches")


class FindingError(AssertionError):
    """What the execution model found wrong with a kernel."""


def build(*, sanitize: bool = False) -> Path:
    """Compile every .cu with the C++ compiler, in a folder named by what the sources are, once."""
    flags = (*FLAGS, "-O1", "-g1", "-fsanitize=address") if sanitize else FLAGS
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp") and path.parent.name != "cpu")
    digest = hashlib.sha256("".join([*flags, *(path.read_text(encoding="utf8") for path in files)]).encode()).hexdigest()[:16]
    folder = ROOT / ".cache" / f"emulated-{digest}"
    library = folder / "libemulated.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may be building the same
        partial = Path(scratch) / library.name

        def compile_one(source: Path) -> Path:
            target = Path(scratch) / f"{source.stem}.o"
            command = [shutil.which("g++") or "c++", *flags, "-c", "-x", "c++", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{source.name}: {done.stderr}"
            assert "warning" not in done.stderr, done.stderr
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, [*SOURCES, *MODEL]))
        subprocess.run([shutil.which("g++") or "c++", *flags, "-shared", *map(str, objects), "-o", str(partial)], check=True)
        partial.rename(library)
    return library


def rounded(values: Any) -> np.ndarray:
    """float64 -> the nearest bf16, as its 16 bits."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def wide(values: np.ndarray) -> np.ndarray:
    """What a kernel's array says, as float64."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def unwritten(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An output before the kernel: not a number in every float type."""
    array = np.empty(shape, dtype=dtype)
    array.view(np.uint8).fill(0xFF)
    return array


class Emulator:
    """Calls of the C interface with numpy arrays. Every array is told to the model; those in `out` may be written."""

    def __init__(self, path: Path, *, seed: int = 0, fault: int = 0, registered: bool = True) -> None:
        self.library = ctypes.CDLL(str(path))
        self.functions = abi.functions(self.library)
        self.library.emu_message.restype = ctypes.c_char_p
        self.library.emu_register.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self.registered = registered  # False: bounds are AddressSanitizer's business
        self.configure(seed, fault)
        self.hold(RESIDENT)

    def hold(self, blocks: int) -> None:
        self.library.emu_resident(ctypes.c_int(blocks))

    def configure(self, seed: int = 0, fault: int = 0) -> None:
        self.library.emu_configure(ctypes.c_uint(seed), ctypes.c_int(fault))

    def call(self, name: str, *arguments: Any, out: tuple[np.ndarray, ...] = ()) -> None:
        """Run one function of the interface; arrays and structures may stand for pointers; the stream is added."""
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        for argument in arguments:
            arrays += argument.arrays if isinstance(argument, Structure) else []
        self.library.emu_forget()
        written = {array.__array_interface__["data"][0] for array in out}
        for address, array in {array.__array_interface__["data"][0]: array for array in arrays if array.nbytes}.items():
            assert array.flags.c_contiguous or array.base is not None
            if self.registered:
                self.library.emu_register(address, array.nbytes, address in written)
        code = self.functions[name](*map(_plain, arguments), None)
        if code == FAILED:
            raise FindingError(f"{name}: {self.library.emu_message().decode()}")
        if code:
            raise RuntimeError(f"{name} returned {code}")

    def counters(self) -> dict[str, int]:
        values = (ctypes.c_long * len(COUNTERS))()
        self.library.emu_counters(values)
        return dict(zip(COUNTERS, values))


class Structure:
    """One of the interface's structures, made from arrays and numbers; keeps the arrays alive."""

    def __init__(self, kind: type[ctypes.Structure], **fields: Any) -> None:
        self.arrays = [value for value in fields.values() if isinstance(value, np.ndarray)]
        self.value = kind(**{name: _plain(value) for name, value in fields.items()})


def _plain(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return argument.__array_interface__["data"][0]
    return ctypes.addressof(argument.value) if isinstance(argument, Structure) else argument


def given(**fields: Any) -> dict[str, Any]:
    return fields


def linear(**fields: Any) -> Structure:
    bias = fields.get("bias")
    return Structure(abi.Linear, **{"alpha": 1.0, "groups": 1, "bias_dtype": int(bias is None or bias.dtype == np.uint16), **fields})


def outer(**fields: Any) -> Structure:
    return Structure(abi.Outer, **{"alpha": 1.0, "groups": 1, "splits": 1, **fields})


def head(**fields: Any) -> Structure:
    return Structure(abi.Head, **{"scale": 1.0, **fields})


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Equal within `tolerance` of the largest value wanted; bf16 outputs may also be off by their own rounding."""
    value = wide(got)
    assert value.shape == want.shape
    assert np.isfinite(value).all(), f"{np.count_nonzero(~np.isfinite(value))} of {value.size} elements were not written, or are not finite"
    allowed = tolerance * max(float(np.abs(want).max(initial=0.0)), 1e-30) + (np.abs(want) * 2.0**-8 if got.dtype == np.uint16 else 0.0)
    worst = float((np.abs(value - want) - allowed).max(initial=-1.0))
    assert worst <= 0, f"off by {worst} more than allowed"
