"""The kernel for Hopper (TMA and wgmma) against float64, for the emulated library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mswift.kernels import cuda_abi as abi
from tests.unit.csrc.emulator import Emulator, close, given, linear, unwritten, wide
from tests.unit.csrc.product_cases import mask_of, some


@contextmanager
def wgmma(emulator: Emulator, count: int, asked: str = "1") -> Iterator[None]:
    """The kernel for Hopper is asked for, and issues so many wgmmas."""
    before = os.environ.get("MSWIFT_WGMMA")
    os.environ["MSWIFT_WGMMA"] = asked
    emulator.library["emu_wgmmas"]()
    try:
        yield
    finally:
        os.environ.pop("MSWIFT_WGMMA")
        if before is not None:
            os.environ["MSWIFT_WGMMA"] = before
    issued = emulator.library["emu_wgmmas"]()
    assert issued == count, f"{issued} wgmmas, not {count}"


def hopper(emulator: Emulator, random: np.random.Generator) -> None:
    """Weights by rows and by columns, several tiles a block, edges, the input in a wider activation, a longer way than the ring."""
    for rows, n, k, columns in ((131, 261, 136, 0), (70, 264, 328, 1), (66, 72, 64, 1), (64, 67, 72, 0)):
        x, bias, scale = some(random, rows, k + 8), some(random, n), random.normal(size=n).astype(np.float32)
        weight = some(random, k, n) if columns else some(random, n, k)
        out, inner = unwritten(rows, n, dtype=np.uint16), unwritten(rows, n, dtype=np.uint16)
        fields = given(x=x, weight=weight, bias=bias, column_scale=scale, out=out, inner=inner, rows=rows, n=n, k=k, x_stride=k + 8, columns=columns)
        tiles = ((rows + 127) // 128) * ((n + 255) // 256)
        with wgmma(emulator, tiles * 8 * ((k + 63) // 64)):
            emulator.call("mswift_linear", linear(**fields, alpha=0.5), out=(out, inner))
        want = 0.5 * wide(x)[:, :k] @ (wide(weight) if columns else wide(weight).T)
        close(inner, want, 1e-6)
        close(out, want * wide(scale) + wide(bias), 1e-6)


def hopper_lora(emulator: Emulator, random: np.random.Generator) -> None:
    """The adapter in the same sums, with and without a mask of its product."""
    rows, n, k = 133, 264, 72
    for rank, p, columns in ((16, 0.3, 1), (8, 0.0, 0), (72, 0.2, 0)):
        dropout = abi.Dropout(seed=0x123456789AB, first_row=3, first_column=6, full_width=6 + n - 2, threshold=abi.threshold_of(p))
        mask = mask_of(rows, n, dropout) if p else np.ones((rows, n))
        x, low, bias = some(random, rows, k), some(random, rows, rank), random.normal(size=n).astype(np.float32)
        weight, up = (some(random, k, n), some(random, rank, n)) if columns else (some(random, n, k), some(random, n, rank))
        out = unwritten(rows, n, dtype=np.uint16)
        fields = given(x=x, weight=weight, low=low, up=up, out=out, rows=rows, n=n, k=k, rank=rank, x_stride=k, columns=columns)
        fields.update(bias=bias, adapter_dropout=dropout)
        with wgmma(emulator, 4 * 8 * (2 + (rank + 63) // 64)):
            emulator.call("mswift_linear", linear(**fields), out=(out,))
        want = bias + wide(x) @ (wide(weight) if columns else wide(weight).T) + mask * (wide(low) @ (wide(up) if columns else wide(up).T))
        close(out, want, 1e-6)


CASES = {case.__name__: case for case in (hopper, hopper_lora)}
