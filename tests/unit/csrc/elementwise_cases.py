"""Element-wise kernels against float64, for the emulated library. Each case allocates, runs, compares."""

from __future__ import annotations

from itertools import product
from math import pi, sqrt

import numpy as np

from mswift.kernels import cuda_abi as abi
from tests.unit.csrc.emulator import Emulator, close, rounded, unwritten, wide

TOLERANCE = {0: 2e-6, 1: 2e-3}


def stored(values: np.ndarray, dtype: int) -> np.ndarray:
    return rounded(values) if dtype else values.astype(np.float32)


def empty(dtype: int, *shape: int) -> np.ndarray:
    return unwritten(*shape, dtype=np.uint16 if dtype else np.float32)


def rms_norm(emulator: Emulator, random: np.random.Generator) -> None:
    shapes = ((3, 72, True, 0), (2, 301, False, 1), (1, 2500, True, 1), (5, 48, False, 0))
    for dtype, (rows, cols, residual, centred) in product((0, 1), shapes):
        x, more, weight, dy, dsum = (
            stored(random.normal(size=shape), dtype) for shape in ((rows, cols), (rows, cols), (cols,), (rows, cols), (rows, cols))
        )
        y, summed, rstd = empty(dtype, rows, cols), empty(dtype, rows, cols), unwritten(rows)
        passed = (more, weight, y, summed) if residual else (None, weight, y, None)
        emulator.call("mswift_rms_norm_forward", dtype, x, *passed, rstd, rows, cols, 1e-3, centred, out=(y, summed, rstd))
        if residual:
            close(summed, wide(x) + wide(more), 1e-7)
        base, factor = wide(summed) if residual else wide(x), wide(weight) + centred
        want_rstd = 1 / np.sqrt((base**2).mean(1, keepdims=True) + 1e-3)
        close(y, base * want_rstd * factor, TOLERANCE[0])
        close(rstd, want_rstd[:, 0], TOLERANCE[0])

        dx, partial, dweight = empty(dtype, rows, cols), unwritten(abi.NORM_BLOCKS, cols), unwritten(cols)
        kept = summed if residual else x
        arguments = (dtype, dy, dsum if residual else None, kept, weight, rstd, dx, partial, dweight, rows, cols, centred)
        emulator.call("mswift_rms_norm_backward", *arguments, out=(dx, partial, dweight))
        normal, scaled = base * want_rstd, wide(dy) * factor
        want = want_rstd * (scaled - normal * (scaled * normal).mean(1, keepdims=True)) + (wide(dsum) if residual else 0)
        close(dx, want, TOLERANCE[0])
        close(dweight, (wide(dy) * normal).sum(0), 5e-6)


def many_rows(emulator: Emulator, random: np.random.Generator) -> None:
    """More rows than blocks: a block's second row meets what its first one left in shared memory."""
    rows, cols = abi.NORM_BLOCKS + 9, 24
    x, weight, dy = (
        random.normal(size=(rows, cols)).astype(np.float32),
        random.normal(size=cols).astype(np.float32),
        random.normal(size=(rows, cols)).astype(np.float32),
    )
    rstd = (1 / np.sqrt((wide(x) ** 2).mean(1) + 1e-6)).astype(np.float32)
    dx, partial, dweight = unwritten(rows, cols), unwritten(abi.NORM_BLOCKS, cols), unwritten(cols)
    emulator.call("mswift_rms_norm_backward", 0, dy, None, x, weight, rstd, dx, partial, dweight, rows, cols, 0, out=(dx, partial, dweight))
    normal, scaled = wide(x) * wide(rstd)[:, None], wide(dy) * wide(weight)
    close(dx, wide(rstd)[:, None] * (scaled - normal * (scaled * normal).mean(1, keepdims=True)), 2e-6)
    close(dweight, (wide(dy) * normal).sum(0), 5e-6)


GATES = {
    "silu": (1.0, 0.0, float("inf"), 0.0),
    "gelu_tanh": (2 * sqrt(2 / pi), 0.044715, float("inf"), 0.0),
    "clamped": (1.702, 0.0, 1.5, 1.0),
}


def activation(name: str, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, d/dgate and d/dup."""
    factor, up_slope = up, np.ones_like(up)
    if name == "silu":
        s = 1 / (1 + np.exp(-gate))
        value, slope = gate * s, s + gate * s * (1 - s)
    elif name == "gelu_tanh":
        t = np.tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))
        value, slope = 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * (1 - t**2) * sqrt(2 / pi) * (1 + 3 * 0.044715 * gate**2)
    else:
        alpha, _, limit, offset = GATES[name]
        c = np.minimum(gate, limit)
        s = 1 / (1 + np.exp(-alpha * c))
        value, slope = c * s, (s + alpha * c * s * (1 - s)) * (gate <= limit)
        factor, up_slope = np.clip(up, -limit, limit) + offset, (np.abs(up) <= limit).astype(np.float64)
    return value * factor, slope * factor, value * up_slope


def gated(emulator: Emulator, random: np.random.Generator) -> None:
    for dtype, (name, shape), cols in product((0, 1), GATES.items(), (40, 37)):
        rows = 5
        both, dy, grads = (
            stored(2 * random.normal(size=(rows, 2 * cols)), dtype),
            stored(random.normal(size=(rows, cols)), dtype),
            empty(dtype, rows, 2 * cols),
        )
        y = empty(dtype, rows, cols)
        at, width = both.__array_interface__["data"][0], cols * both.itemsize
        into = grads.__array_interface__["data"][0]
        # gate and up are the halves of one tensor: pointers into it, a stride of two widths
        emulator.call("mswift_gated_forward", dtype, both, at + width, y, rows, cols, 2 * cols, *shape, out=(y,))
        emulator.call("mswift_gated_backward", dtype, dy, both, at + width, grads, into + width, rows, cols, 2 * cols, *shape, out=(grads,))
        value, of_gate, of_up = activation(name, wide(both[:, :cols]), wide(both[:, cols:]))
        close(y, value, 3e-6)
        close(grads, np.concatenate((wide(dy) * of_gate, wide(dy) * of_up), 1), 3e-6)
    lost, y = np.full((1, 2), np.nan, dtype=np.float32), unwritten(1, 1)
    emulator.call("mswift_gated_forward", 0, *(lost, lost[:, 1:], y, 1, 1, 2), *GATES["clamped"], out=(y,))
    assert np.isnan(y).all(), "what is not a number stays so"


def rope(emulator: Emulator, random: np.random.Generator) -> None:
    for dtype, interleaved, (dim, rotary), in_place in product((0, 1), (0, 1), ((32, 32), (40, 16), (22, 10)), (False, True)):
        tokens, heads, extra = 5, 3, 8
        stride = heads * dim + extra  # of a fused tensor: q, and something behind it
        angle = random.uniform(0, 6, size=(tokens, rotary // 2))
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        x = stored(random.normal(size=(tokens, stride)), dtype)
        for sign in (1, -1):
            source = x.copy()
            out = source if in_place else empty(dtype, tokens, stride)
            where = (tokens, heads, dim, rotary, 1, stride, dim, stride, dim, interleaved, sign)
            emulator.call("mswift_rope", dtype, source, out, cosine, sine, *where, out=(out,))
            whole = wide(x)[:, : heads * dim].reshape(tokens, heads, dim)
            c, s = wide(cosine)[:, None], sign * wide(sine)[:, None]
            first, second = (slice(0, rotary, 2), slice(1, rotary, 2)) if interleaved else (slice(0, rotary // 2), slice(rotary // 2, rotary))
            want = whole.copy()
            want[..., first] = whole[..., first] * c - whole[..., second] * s
            want[..., second] = whole[..., second] * c + whole[..., first] * s
            close(out[:, : heads * dim].reshape(tokens, heads, dim), want, 1e-6)
            rest = out[:, heads * dim :]
            assert (rest == x[:, heads * dim :]).all() if in_place else (rest.view(np.uint8) == 0xFF).all(), "what lies behind is not touched"
            if in_place:
                continue
            # two tokens share a position, out of a fused tensor into a dense one
            dense = empty(dtype, tokens, heads, dim)
            shared = (tokens, heads, dim, rotary, 2, stride, dim, heads * dim, dim, interleaved, sign)
            emulator.call("mswift_rope", dtype, source, dense, cosine, sine, *shared, out=(dense,))
            c, s = wide(cosine)[np.arange(tokens) // 2][:, None], sign * wide(sine)[np.arange(tokens) // 2][:, None]
            want[..., first] = whole[..., first] * c - whole[..., second] * s
            want[..., second] = whole[..., second] * c + whole[..., first] * s
            close(dense, want, 1e-6)


def permute(emulator: Emulator, random: np.random.Generator) -> None:
    for dtype, cols in product((0, 1), (48, 21, 1100)):
        tokens, k = 6, 3
        x, dy = stored(random.normal(size=(tokens * k, cols)), dtype), stored(random.normal(size=(tokens, cols)), dtype)
        index = random.permutation(tokens * k).reshape(tokens, k)
        index[2, 1] = -1
        gathered = empty(dtype, tokens * k, cols)
        emulator.call("mswift_gather_rows", dtype, x, index, gathered, tokens * k, cols, out=(gathered,))
        close(gathered, np.where(index.reshape(-1, 1) < 0, 0, wide(x)[index.reshape(-1)]), 1e-7)
        weights = random.uniform(0.1, 1, size=(tokens, k)).astype(np.float32)
        for used in (weights, None):
            factor = (wide(weights) if used is not None else np.ones((tokens, k))) * (index >= 0)
            y = empty(dtype, tokens, cols)
            emulator.call("mswift_combine_rows", dtype, x, index, used, y, tokens, k, cols, out=(y,))
            close(y, (factor[..., None] * wide(x)[index]).sum(1), 1e-6)
            dx, dweights = stored(np.zeros((tokens * k, cols)), dtype), unwritten(tokens, k)
            emulator.call("mswift_combine_rows_backward", dtype, dy, x, index, used, dx, dweights, tokens, k, cols, out=(dx, dweights))
            want = np.zeros((tokens * k, cols))
            want[index[index >= 0]] = (factor[..., None] * wide(dy)[:, None])[index >= 0]
            close(dx, want, 1e-6)
            close(dweights, (wide(dy)[:, None] * wide(x)[index]).sum(-1) * (index >= 0), 3e-6)


def column_sum(emulator: Emulator, random: np.random.Generator) -> None:
    for dtype, (rows, cols), both in product((0, 1), ((300, 40), (7, 33)), (True, False)):
        a, b = (stored(random.normal(size=(rows, cols)), dtype) for _ in range(2))
        partial, out = unwritten(abi.NORM_BLOCKS, cols), unwritten(cols)
        emulator.call("mswift_column_sum", dtype, a, b if both else None, partial, out, rows, cols, cols, out=(partial, out))
        close(out, (wide(a) * (wide(b) if both else 1)).sum(0), 5e-6)


CASES = {case.__name__: case for case in (rms_norm, many_rows, gated, rope, permute, column_sum)}
