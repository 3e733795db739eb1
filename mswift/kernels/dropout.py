"""The dropout mask of csrc/common/dropout.h in plain torch: a function of (seed, row, column), drawn again wherever it is needed.

An element is kept if its eight bits are at least `threshold_of` the rate, and then multiplied by `factor_of` that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mswift.kernels.cuda_abi import threshold_of

__all__ = ["factor_of", "kept", "threshold_of"]

_LOW = 0xFFFFFFFF


def factor_of(threshold: int) -> float:
    """What keeps the mean."""
    return 256.0 / (256 - threshold)


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _LOW
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _LOW  # the low 32 bits are right though the product overflows
    return h ^ (h >> 16)


def kept(seeds: Tensor, rows: Tensor, columns: tuple[int, int], full_width: int, threshold: int) -> Tensor:
    """Bool ``[rows, stop - start]``: which elements stay; columns at or beyond `full_width` do not.

    Args:
        seeds: int64 of each row. rows: int64, the number of each row under its seed. columns: ``(start, stop)``.
    """
    column = torch.arange(*columns, device=rows.device)
    of_column = _mix(((seeds & _LOW)[:, None] + (column // 4) * 0x9E3779B1) & _LOW)
    of_row = (rows & _LOW) * 0x85EBCA77 + (rows >> 32) * 0xC2B2AE3D + ((seeds >> 32) & _LOW)
    draws = _mix((of_column + of_row[:, None]) & _LOW)
    return ((draws >> (8 * (column % 4)) & 255) >= threshold) & (column < full_width)
