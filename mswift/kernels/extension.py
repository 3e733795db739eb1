"""The compiled kernels of csrc/: loaded when this module is. Without them everything runs on the plain-torch references.

Loading is by path and needs no Python API of the extension, so that a CUDA library beside it can register kernels for the same operators.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from mswift.log import get_logger

_FOLDER = Path(__file__).resolve().parent / "lib"  # no package: what is in it is not imported
_LIBRARY = _FOLDER / "libmswift_cpu.so"
_NOTE = _FOLDER / "build.txt"
_SCHEMAS = _FOLDER.parents[2] / "csrc" / "ops.cpp"  # of a source tree; an installed package has none

LEVELS = ("none", "avx2", "avx512", "avx512_bf16", "amx")

logger = get_logger(__name__)


def _changed(source: str) -> list[str]:
    """The operators of these definitions that the loaded library does not have, or has with other arguments."""
    parts = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)', source)
    schemas = [torch._C.parse_schema("mswift::" + "".join(re.findall(r'"([^"]*)"', part))) for part in parts]
    return [schema.name for schema in schemas if schema not in torch._C._jit_get_schemas_for_operator(schema.name)]


def _load() -> str | None:
    if not _LIBRARY.is_file():
        note = _NOTE.read_text(encoding="utf8").strip() if _NOTE.is_file() else "they were not built"
        return f"{note}; with a compiler and torch in place: pip install --no-build-isolation --no-deps --force-reinstall ."
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"built for another torch than {torch.__version__}: {' '.join(str(error).split())[:200]}"
    built = torch.ops.mswift.built_for()
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"built for torch {built}, and this is {torch.__version__}; install mswift again"
    changed = _changed(_SCHEMAS.read_text(encoding="utf8")) if _SCHEMAS.is_file() else []
    return f"they are from another version of the sources, which differ in {', '.join(changed)}; run make setup" if changed else None


_REASON = _load()
_ISA = "none" if _REASON else torch.ops.mswift.isa()
_told = False


def available() -> bool:
    """Whether the compiled operators exist, so that their shapes for tracing can be registered."""
    return _REASON is None


def missing() -> str | None:
    """Why the compiled kernels cannot be used, or None. A reason is told once."""
    global _told
    if _REASON is not None and not _told:
        _told = True
        logger.warning("the compiled kernels are not in use (%s); plain torch is, which is slower and gives the same results", _REASON)
    return _REASON


def when_loaded(describe: Callable[[], None]) -> Callable[[], None]:
    """Call `describe` if the operators exist: it tells torch of their shapes and gradients. May stand as a decorator."""
    if available():
        describe()
    return describe


def isa() -> str:
    """The instruction set that the CPU kernels use: none, avx2, avx512, avx512_bf16 or amx (MSWIFT_ISA lowers it)."""
    return _ISA


def isa_at_least(level: str) -> bool:
    """Whether the kernels can use the instructions of `level`, one of `LEVELS`."""
    return LEVELS.index(isa()) >= LEVELS.index(level)
