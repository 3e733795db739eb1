"""Matrix-product kernels against float64, for the emulated library: LoRA, groups, quantised weights, weight gradients."""

from __future__ import annotations

import ctypes
from itertools import product

import numpy as np

from mswift.kernels import cuda_abi as abi
from tests.unit.csrc.emulator import Emulator, close, given, linear, outer, rounded, unwritten, wide

MASK = (1 << 32) - 1
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D & MASK
    h ^= h >> 15
    h = h * 0x846CA68B & MASK
    return h ^ h >> 16


def mask_of(rows: int, cols: int, dropout: abi.Dropout) -> np.ndarray:
    """csrc/common/dropout.h said again in Python: the factors of a mask."""
    factors = np.zeros((rows, cols))
    for row, col in product(range(rows), range(cols)):
        r, c = row + dropout.first_row, col + dropout.first_column
        draws = mix((mix((dropout.seed + (c // 4) * 0x9E3779B1) & MASK) + r * 0x85EBCA77 + (dropout.seed >> 32)) & MASK)
        if c < dropout.full_width and (draws >> 8 * (c % 4)) & 255 >= dropout.threshold:
            factors[row, col] = 256 / (256 - dropout.threshold)
    return factors


def some(random: np.random.Generator, *shape: int) -> np.ndarray:
    return rounded(random.normal(size=shape))


def plain_linear(emulator: Emulator, random: np.random.Generator) -> None:
    sizes = ((5, 12, 24, 1, 0), (131, 136, 40, 0, 0), (9, 19, 37, 0, 0), (9, 19, 37, 1, 1), (70, 140, 72, 0, 1))
    for rows, n, k, thin, columns in sizes:
        x, bias, scale = some(random, rows, k), some(random, n), random.normal(size=n).astype(np.float32)
        weight = some(random, k, n) if columns else some(random, n, k)
        x_scale = random.normal(size=k).astype(np.float32)
        out = unwritten(rows, n, dtype=np.uint16)
        fields = given(
            x=x, weight=weight, bias=bias, column_scale=scale, out=out, rows=rows, n=n, k=k, x_stride=k, columns=columns, thin=thin, alpha=0.5
        )
        emulator.call("mswift_linear", linear(**fields), out=(out,))
        matrix = wide(weight) if columns else wide(weight).T
        close(out, 0.5 * (wide(x) @ matrix) * wide(scale) + wide(bias), 1e-6)
        out = unwritten(rows, n, dtype=np.uint16)
        emulator.call("mswift_linear", linear(**{**fields, "x_column_scale": x_scale, "bias": None, "out": out}), out=(out,))
        close(out, 0.5 * (wide(rounded(wide(x) * x_scale)) @ matrix) * wide(scale), 1e-6)


def lora(emulator: Emulator, random: np.random.Generator) -> None:
    """A layer with its adapter, all five products, with and without dropout; the input is some columns of a wider activation."""
    for rows, inside, outside, rank, p in ((9, 24, 40, 8, 0.0), (133, 56, 144, 16, 0.3), (7, 37, 21, 5, 0.2)):
        dropout = abi.Dropout(seed=0x123456789AB, first_row=3, first_column=6, full_width=6 + inside - 2, threshold=abi.threshold_of(p))
        mask = mask_of(rows, inside, dropout) if p else np.ones((rows, inside))
        x, weight, bias, a, b, dy = (
            some(random, *shape) for shape in ((rows, inside), (outside, inside), (outside,), (rank, inside), (outside, rank), (rows, outside))
        )
        scale = 0.7
        low, y, dlow, dx = (unwritten(rows, width, dtype=np.uint16) for width in (rank, outside, rank, inside))
        down = linear(x=x, weight=a, out=low, rows=rows, n=rank, k=inside, x_stride=inside, thin=1, alpha=scale, x_dropout=dropout)
        emulator.call("mswift_linear", down, out=(low,))
        dropped = wide(rounded(wide(x) * mask))
        close(low, scale * dropped @ wide(a).T, 1e-6)
        both = given(rows=rows, rank=rank)
        forward = linear(x=x, weight=weight, bias=bias, low=low, up=b, out=y, n=outside, k=inside, x_stride=inside, **both)
        emulator.call("mswift_linear", forward, out=(y,))
        close(y, wide(x) @ wide(weight).T + wide(bias) + wide(low) @ wide(b).T, 1e-6)

        down = linear(x=dy, weight=b, out=dlow, rows=rows, n=rank, k=outside, x_stride=outside, thin=1, columns=1, alpha=scale)
        emulator.call("mswift_linear", down, out=(dlow,))
        close(dlow, scale * wide(dy) @ wide(b), 1e-6)
        fields = given(x=dy, weight=weight, low=dlow, up=a, out=dx, n=inside, k=outside, x_stride=outside, columns=1, adapter_dropout=dropout, **both)
        emulator.call("mswift_linear", linear(**fields), out=(dx,))
        close(dx, wide(dy) @ wide(weight) + mask * (wide(dlow) @ wide(a)), 1e-6)

        da, db, partial = unwritten(rank, inside), unwritten(outside, rank, dtype=np.uint16), unwritten(3, rank, inside)
        fields = given(a=dlow, b=x, out=da, partial=partial, rows=rows, m=rank, n=inside, a_stride=rank, b_stride=inside, splits=3, b_dropout=dropout)
        emulator.call("mswift_outer", outer(**fields), out=(da, partial))
        close(da, wide(dlow).T @ dropped, 1e-6)
        fields = given(a=dy, b=low, out=db, rows=rows, m=outside, n=rank, a_stride=outside, b_stride=rank, out_dtype=1)
        emulator.call("mswift_outer", outer(**fields), out=(db,))
        close(db, wide(dy).T @ wide(low), 1e-6)


def grouped(emulator: Emulator, random: np.random.Generator) -> None:
    """Rows sorted by expert, one expert without any; then the same base for all and an adapter for each."""
    offsets = np.array([0, 3, 3, 140, 147])
    groups, rows, n, k, rank = 4, 147, 24, 40, 8
    x, weight, low, up, dy = (some(random, *shape) for shape in ((rows, k), (groups, n, k), (rows, rank), (groups, n, rank), (rows, n)))
    for shared in (False, True):
        out = unwritten(rows, n, dtype=np.uint16)
        fields = given(x=x, weight=weight, low=low, up=up, offsets=offsets, out=out, rows=rows, n=n, k=k, rank=rank, x_stride=k, groups=groups)
        emulator.call("mswift_linear", linear(**fields, weight_stride=0 if shared else n * k, up_stride=n * rank), out=(out,))
        want = np.zeros((rows, n))
        for g in range(groups):
            part = slice(offsets[g], offsets[g + 1])
            want[part] = wide(x)[part] @ wide(weight)[0 if shared else g].T + wide(low)[part] @ wide(up)[g].T
        close(out, want, 1e-6)
    masks_of_groups(emulator, x, weight, low, up, dy, offsets)
    groups_apart(emulator, x, weight, low, up, offsets)
    for splits in (1, 2):
        grads, partial = unwritten(groups, n, k), unwritten(splits, groups, n, k)
        fields = given(
            a=dy, b=x, offsets=offsets, out=grads, partial=partial, rows=rows, m=n, n=k, a_stride=n, b_stride=k, groups=groups, splits=splits
        )
        emulator.call("mswift_outer", outer(**fields), out=(grads, partial))
        parts = [slice(offsets[g], offsets[g + 1]) for g in range(groups)]
        close(grads, np.stack([wide(dy)[part].T @ wide(x)[part] for part in parts]), 1e-6)


def apart(matrices: np.ndarray, *, shift: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Copies that lie apart, the second one `shift` elements from where it would be aligned; and the table of where they start."""
    copies = []
    for number, matrix in enumerate(matrices):
        room = unwritten(matrix.size + 16, dtype=matrix.dtype)
        first = -room.__array_interface__["data"][0] % 16 // matrix.itemsize + (shift if number == 1 else 0)
        copies.append(room[first : first + matrix.size])
        copies[-1][:] = matrix.reshape(-1)
    return np.array([copy.__array_interface__["data"][0] for copy in copies], dtype=np.uint64), copies


def groups_apart(emulator: Emulator, x: np.ndarray, weight: np.ndarray, low: np.ndarray, up: np.ndarray, offsets: np.ndarray) -> None:
    """Weights, adapters and biases of groups at places of their own, aligned for 16-byte accesses or not."""
    (rows, k), (groups, n, rank) = x.shape, up.shape
    bias = rounded(np.linspace(-1, 1, groups * n).reshape(groups, n))
    for shift in (0, 1):
        (weights, some_weights), (ups, some_ups), (biases, some_biases) = (apart(part, shift=shift) for part in (weight, up, bias))
        out = unwritten(rows, n, dtype=np.uint16)
        fields = given(x=x, weight_table=weights, low=low, up_table=ups, bias_table=biases, offsets=offsets, out=out, rows=rows, n=n, k=k, rank=rank)
        structure = linear(**fields, x_stride=k, groups=groups)
        structure.arrays += [*some_weights, *some_ups, *some_biases]
        emulator.call("mswift_linear", structure, out=(out,))
        want = np.zeros((rows, n))
        for g in range(groups):
            part = slice(offsets[g], offsets[g + 1])
            want[part] = wide(x)[part] @ wide(weight)[g].T + wide(low)[part] @ wide(up)[g].T + wide(bias)[g]
        close(out, want, 1e-6)
    out = unwritten(rows, n, dtype=np.uint16)
    of_all = np.linspace(-1, 1, n).astype(np.float32)
    structure = linear(**{**fields, "bias_table": None, "out": out}, bias=of_all, x_stride=k, groups=groups)  # fp32, one for all groups
    structure.arrays += [*some_weights, *some_ups]
    emulator.call("mswift_linear", structure, out=(out,))
    of_groups = np.concatenate([np.tile(wide(bias)[g], (offsets[g + 1] - offsets[g], 1)) for g in range(groups)])
    close(out, want - of_groups + wide(of_all), 1e-6)


def masks_of_groups(
    emulator: Emulator, x: np.ndarray, weight: np.ndarray, low: np.ndarray, up: np.ndarray, dy: np.ndarray, offsets: np.ndarray
) -> None:
    """A seed for each group, rows counted from the group's first: dropout of the input, of the adapter's product, in a gradient; biases too."""
    (rows, k), (groups, n, rank) = x.shape, up.shape
    seeds, bias = np.array([5, 6, 2**40 + 7, 8]), rounded(np.linspace(-1, 1, groups * n).reshape(groups, n))
    parts = [slice(offsets[g], offsets[g + 1]) for g in range(groups)]

    def masks(cols: int) -> np.ndarray:
        return np.concatenate([mask_of(part.stop - part.start, cols, abi.Dropout(int(seed), 0, 4, cols + 2, 90)) for seed, part in zip(seeds, parts)])

    common = given(offsets=offsets, group_seeds=seeds, groups=groups, rows=rows)
    down, dropout = unwritten(rows, rank, dtype=np.uint16), abi.Dropout(0, 0, 4, n + 2, 90)
    fields = given(x=dy, weight=up, out=down, n=rank, k=n, x_stride=n, weight_stride=n * rank, x_dropout=dropout, thin=1, columns=1)
    emulator.call("mswift_linear", linear(**fields, **common), out=(down,))
    dropped = wide(rounded(wide(dy) * masks(n)))
    close(down, np.concatenate([dropped[part] @ wide(up)[g] for g, part in enumerate(parts)]), 1e-6)
    out, dropout = unwritten(rows, n, dtype=np.uint16), abi.Dropout(0, 0, 4, n + 2, 90)
    inner, scale = unwritten(rows, n, dtype=np.uint16), np.linspace(0.5, 2, n).astype(np.float32)
    fields = given(x=x, weight=weight, low=low, up=up, out=out, inner=inner, n=n, k=k, rank=rank, x_stride=k, weight_stride=n * k, up_stride=n * rank)
    fields.update(bias=bias, bias_stride=n, column_scale=scale, adapter_dropout=dropout)
    emulator.call("mswift_linear", linear(**fields, **common), out=(out, inner))
    adapter = masks(n) * np.concatenate([wide(low)[part] @ wide(up)[g].T for g, part in enumerate(parts)])
    want = adapter + np.concatenate([wide(x)[part] @ wide(weight)[g].T for g, part in enumerate(parts)])
    close(inner, want, 1e-6)
    close(out, want * wide(scale) + np.concatenate([np.tile(wide(bias)[g], (part.stop - part.start, 1)) for g, part in enumerate(parts)]), 1e-6)
    grads = unwritten(groups, n, k)
    fields = given(a=dy, b=x, out=grads, m=n, n=k, a_stride=n, b_stride=k, b_dropout=abi.Dropout(0, 0, 4, k + 2, 90))
    emulator.call("mswift_outer", outer(**fields, **common), out=(grads,))
    dropped = wide(rounded(wide(x) * masks(k)))
    close(grads, np.stack([wide(dy)[part].T @ dropped[part] for part in parts]), 1e-6)


def drop(emulator: Emulator, random: np.random.Generator) -> None:
    """A mask by itself, fp32 and bf16, whole packs and not; an element that is dropped is 0 whatever it was."""
    for dtype, cols in product((np.float32, np.uint16), (16, 13)):
        x = random.normal(size=(5, cols)).astype(np.float32) if dtype == np.float32 else some(random, 5, cols)
        mask, out = abi.Dropout(seed=2**33 + 1, first_row=2, first_column=5, full_width=cols + 4, threshold=120), unwritten(5, cols, dtype=dtype)
        factors = mask_of(5, cols, mask)
        x[factors == 0] = np.nan if dtype == np.float32 else 0x7FC0
        emulator.call("mswift_drop", int(dtype == np.uint16), x, out, 5, cols, ctypes.addressof(mask), out=(out,))
        close(out, np.where(factors == 0, 0, wide(x) * factors), 1e-6)
        mask.unscaled = 1
        emulator.call("mswift_drop", int(dtype == np.uint16), x, out, 5, cols, ctypes.addressof(mask), out=(out,))
        close(out, np.where(factors == 0, 0, wide(x)), 1e-7)


def weight_gradient(emulator: Emulator, random: np.random.Generator) -> None:
    """Large tiles, odd sizes, a gradient added to what is there."""
    for rows, m, n, splits in ((70, 136, 144, 1), (65, 130, 43, 2)):
        a, b, before = some(random, rows, m), some(random, rows, n), random.normal(size=(m, n)).astype(np.float32)
        out, partial = before.copy(), unwritten(splits, m, n)
        fields = given(a=a, b=b, partial=partial, rows=rows, m=m, n=n, a_stride=m, b_stride=n, splits=splits, accumulate=1)
        emulator.call("mswift_outer", outer(out=out, **fields), out=(out, partial))
        close(out, before + wide(a).T @ wide(b), 1e-6)


def quantised(emulator: Emulator, random: np.random.Generator) -> None:
    for kind, columns, (rows, n, k) in product((abi.INT8, abi.NF4), (0, 1), ((5, 40, 72), (6, 144, 64))):
        shape = (k, n) if columns else (n, k)
        if kind == abi.INT8:
            codes = random.integers(-127, 128, size=shape).astype(np.int8)
            scales = random.uniform(0.001, 0.02, size=shape[0]).astype(np.float32)
            weight, block = codes * scales[:, None].astype(np.float64), 0
        else:
            levels, block = random.integers(0, 16, size=n * k), 32
            scales = random.uniform(0.1, 2, size=(n * k + block - 1) // block).astype(np.float32)
            codes = (levels[0::2] << 4 | levels[1::2]).astype(np.uint8)
            weight = (np.array(NF4)[levels] * np.repeat(scales.astype(np.float64), block)[: n * k]).reshape(shape)
        x, out = some(random, rows, k), unwritten(rows, n, dtype=np.uint16)
        fields = given(
            x=x, weight=codes, weight_scales=scales, out=out, rows=rows, n=n, k=k, x_stride=k, columns=columns, weight_kind=kind, weight_block=block
        )
        emulator.call("mswift_linear", linear(**fields), out=(out,))
        weight = wide(rounded(weight))  # as a dequantised bf16 weight is
        close(out, wide(x) @ (weight if columns else weight.T), 1e-6)


CASES = {case.__name__: case for case in (plain_linear, lora, grouped, drop, weight_gradient, quantised)}
