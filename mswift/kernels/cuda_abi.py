"""The C interface of ``csrc/cuda/mswift_cuda.h`` for ctypes. No torch here: the tests drive the same interface without it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any

UNSUPPORTED = -1
NORM_BLOCKS = 256
DTYPES = {"float32": 0, "bfloat16": 1}
BF16, INT8, NF4 = 0, 1, 2
CHUNK = 128
"""The vocabulary is worked on in multiples of so many rows, tokens in tiles of as many."""
HEAD_WORKSPACE = 66816
"""Bytes of workspace for each block of a head's groups."""


class Dropout(ctypes.Structure):
    _fields_ = (
        ("seed", c_uint64),
        ("first_row", c_int64),
        ("first_column", c_uint32),
        ("full_width", c_uint32),
        ("threshold", c_uint32),
        ("unscaled", c_uint32),
    )


class Linear(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "low", "up", "bias")),
        *((name, c_void_p) for name in ("weight_scales", "column_scale", "x_column_scale")),
        *((name, c_void_p) for name in ("offsets", "group_seeds", "weight_table", "up_table", "bias_table", "out", "inner")),
        *((name, c_int64) for name in ("rows", "n", "k", "rank", "x_stride", "weight_stride", "up_stride", "bias_stride", "groups")),
        ("x_dropout", Dropout),
        ("adapter_dropout", Dropout),
        ("alpha", c_float),
        *((name, c_int) for name in ("weight_kind", "weight_block", "bias_dtype", "columns", "thin")),
    )


class Outer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("a", "b", "offsets", "group_seeds", "out", "partial")),
        *((name, c_int64) for name in ("rows", "m", "n", "a_stride", "b_stride", "groups")),
        ("b_dropout", Dropout),
        ("a_column_scale", c_void_p),
        ("alpha", c_float),
        *((name, c_int) for name in ("splits", "out_dtype", "accumulate")),
    )


class Head(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "bias", "labels")),
        *((name, c_int64) for name in ("tokens", "hidden", "vocab", "first", "size")),
        ("scale", c_float),
        ("softcap", c_float),
        ("without_label", c_int),
    )


_TYPES = {"i": c_int, "p": c_void_p, "l": c_int64, "f": c_float}
SIGNATURES = {
    "mswift_rms_norm_forward": "ippppppllfip",
    "mswift_rms_norm_backward": "ippppppppllip",
    "mswift_gated_forward": "ippplllffffp",
    "mswift_gated_backward": "ippppplllffffp",
    "mswift_rope": "ippppliiiilllliip",
    "mswift_gather_rows": "ipppllp",
    "mswift_combine_rows": "ipppplilp",
    "mswift_combine_rows_backward": "ipppppplilp",
    "mswift_drop": "ippllpp",
    "mswift_column_sum": "ipppplllp",
    "mswift_linear": "pp",
    "mswift_outer": "pp",
    "mswift_head_statistics": "pppip",
    "mswift_head_merge": "ppllp",
    "mswift_head_sweep": "pppppipip",
    "mswift_head_gradient": "pppppipiippip",
    "mswift_head_group": "l",
    "mswift_head_groups": "l",
    "mswift_head_on_chip": "l",
    "mswift_head_sweep_on_chip": "pppppip",
    "mswift_head_gradient_on_chip": "pppppipiipp",
}
"""Argument types of each function, one letter each: i int, p pointer, l int64, f float. All return an int, 0 for success."""


def functions(library: ctypes.CDLL) -> dict[str, Callable[..., int]]:
    """The library's functions with their argument types told to ctypes: a wrong number or kind of arguments is an error and no crash.

    Raises:
        RuntimeError: it lacks one.
    """
    found: dict[str, Callable[..., int]] = {}
    for name, letters in SIGNATURES.items():
        try:
            function: Any = library[name]
        except AttributeError as error:
            raise RuntimeError(f"{library._name}: no {name} in it: the compiled kernels are from another version; install mswift again") from error
        function.argtypes = [_TYPES[letter] for letter in letters]
        function.restype = c_int
        found[name] = function
    return found


def splits_of(rows: int, m: int, n: int, tiles: int) -> int:
    """Into how many parts the rows of an outer product ``[m, n]`` are cut so that about two hundred blocks have work.

    Each part goes through memory in fp32, 8 m n bytes for 2 (m + n) a row: no more than a tenth.
    """
    return max(1, min(64, 216 // max(1, tiles), rows // max(256, 40 * m * n // (m + n) + 1)))


def threshold_of(probability: float) -> int:
    """The dropout rate in 256ths; 0: nothing is dropped, and no other rate than 0 gives that."""
    return max(1, min(255, round(probability * 256))) if probability > 0 else 0


__all__ = ["BF16", "CHUNK", "DTYPES", "HEAD_WORKSPACE", "INT8", "NF4", "NORM_BLOCKS", "SIGNATURES", "UNSUPPORTED"]
__all__ += ["Dropout", "Head", "Linear", "Outer", "c_int32", "functions", "splits_of", "threshold_of"]
