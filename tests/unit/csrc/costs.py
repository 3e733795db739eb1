"""Bytes and floating-point operations of the CUDA kernels, counted while they run on the execution model, beside the least that the task needs.

python -m tests.unit.csrc.costs    prints the table of docs/kernels.md

Bytes: each address that a launch touches counts once for it (re-reads by other blocks are the cache's business), summed over the launches of
the operator; the least: inputs and outputs of the operator once. Operations: those of the tensor cores, which padded tiles do as well.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mswift.kernels import cuda_abi as abi
from tests.unit.csrc.emulator import Emulator, Structure, build, given, head, linear, outer, rounded, unwritten, wide
from tests.unit.csrc.product_cases import apart


class Cost(NamedTuple):
    """Of one operator at one size."""

    name: str
    size: str
    bytes: int
    least_bytes: int
    flops: int
    least_flops: int

    def row(self) -> str:
        flops = f"{self.flops / 1e6:.1f} | {self.least_flops / 1e6:.1f} | {self.flops / self.least_flops:.2f}" if self.least_flops else "- | - | -"
        return (
            f"| {self.name} | {self.size} | {self.bytes / 1e6:.3f} | {self.least_bytes / 1e6:.3f} | {self.bytes / self.least_bytes:.2f} | {flops} |"
        )


HEADER = (
    "| operator (bf16) | size | MB | least | ratio | MFLOP | least | ratio |\n|---|---|---|---|---|---|---|---|",
    "Beyond a hidden size of 640 the workspace through which blocks pass each other probabilities is in the bytes, once read and once written.",
)


def half(*shape: int) -> np.ndarray:
    return rounded(np.random.default_rng(0).normal(size=shape))


def empty(*shape: int) -> np.ndarray:
    return unwritten(*shape, dtype=np.uint16)


class Meter:
    """Runs calls and reads the counters."""

    def __init__(self) -> None:
        self.emulator = Emulator(build())

    def cost(self, name: str, size: str, run: Callable[[Emulator], None], least_bytes: int, least_flops: int = 0) -> Cost:
        self.emulator.configure()
        run(self.emulator)
        counted = self.emulator.counters()
        return Cost(name, size, counted["distinct_read"] + counted["distinct_written"], least_bytes, counted["flops"], least_flops)


def once(name: str, structure: Structure, out: np.ndarray, emulator: Emulator) -> None:
    emulator.call(name, structure, out=(out,))


def norms(meter: Meter) -> Iterator[Cost]:
    rows, cols = 8192, 128
    x, weight, y, summed, rstd = half(rows, cols), half(cols), empty(rows, cols), empty(rows, cols), unwritten(rows)
    forward = ("mswift_rms_norm_forward", 1, x, x.copy(), weight, y, summed, rstd, rows, cols, 1e-5, 0)
    least = 8 * rows * cols + 2 * cols + 4 * rows
    yield meter.cost("rms_norm with residual", f"{rows} x {cols}", lambda e: e.call(*forward, out=(y, summed, rstd)), least)
    dx, partial, dweight = empty(rows, cols), unwritten(abi.NORM_BLOCKS, cols), unwritten(cols)
    backward = ("mswift_rms_norm_backward", 1, y, None, x, weight, rstd, dx, partial, dweight, rows, cols, 0)
    least = 6 * rows * cols + 6 * cols + 4 * rows
    yield meter.cost("its gradients", f"{rows} x {cols}", lambda e: e.call(*backward, out=(dx, partial, dweight)), least)
    alone = ("mswift_rms_norm_forward", 1, x, None, weight, y, None, rstd, rows, cols, 1e-5, 1)
    least = 4 * rows * cols + 2 * cols + 4 * rows
    yield meter.cost("rms_norm, zero-centred", f"{rows} x {cols}", lambda e: e.call(*alone, out=(y, rstd)), least)
    frozen = ("mswift_rms_norm_backward", 1, y, summed, x, weight, rstd, dx, None, None, rows, cols, 1)
    least = 8 * rows * cols + 2 * cols + 4 * rows
    yield meter.cost("its gradient, weight frozen", f"{rows} x {cols}", lambda e: e.call(*frozen, out=(dx,)), least)
    rows *= 2
    a, partial, out = half(rows, cols), unwritten(abi.NORM_BLOCKS, cols), unwritten(cols)
    summing = ("mswift_column_sum", 1, a, None, partial, out, rows, cols, cols)
    yield meter.cost("sum over rows", f"{rows} x {cols}", lambda e: e.call(*summing, out=(partial, out)), 2 * rows * cols + 4 * cols)


def element_wise(meter: Meter) -> Iterator[Cost]:
    rows, cols = 256, 512
    gate, up, y = half(rows, cols), half(rows, cols), empty(rows, cols)
    size, silu = f"{rows} x {cols}", (1.0, 0.0, float("inf"), 0.0)
    yield meter.cost("swiglu", size, lambda e: e.call("mswift_gated_forward", 1, gate, up, y, rows, cols, cols, *silu, out=(y,)), 6 * rows * cols)
    dgate, dup = empty(rows, cols), empty(rows, cols)
    arguments = ("mswift_gated_backward", 1, y, gate, up, dgate, dup, rows, cols, cols, *silu)
    yield meter.cost("its gradients", size, lambda e: e.call(*arguments, out=(dgate, dup)), 10 * rows * cols)
    heads, dim = 8, 64
    cosine, sine = (np.ones((rows, dim // 2), dtype=np.float32) for _ in range(2))
    q = half(rows, heads * dim)
    arguments = ("mswift_rope", 1, q, q, cosine, sine, rows, heads, dim, dim, 1, heads * dim, dim, heads * dim, dim, 0, 1)
    least = 4 * rows * heads * dim + 4 * rows * dim
    yield meter.cost("rope, in place", f"{rows} x {heads} heads of {dim}", lambda e: e.call(*arguments, out=(q,)), least)
    q = half(rows, heads * dim)
    arguments = ("mswift_rope", 1, q, q, cosine, sine, rows, heads, dim, dim, 1, heads * dim, dim, heads * dim, dim, 1, 1)
    yield meter.cost("rope, interleaved, in place", f"{rows} x {heads} heads of {dim}", lambda e: e.call(*arguments, out=(q,)), least)
    mask = abi.Dropout(seed=5, first_row=0, first_column=0, full_width=cols, threshold=26)
    arguments = ("mswift_drop", 1, gate, y, rows, cols, ctypes.addressof(mask))
    yield meter.cost("dropout", size, lambda e: e.call(*arguments, out=(y,)), 4 * rows * cols)
    k = 2
    x, index, weights = half(rows * k, cols), np.random.default_rng(0).permutation(rows * k).reshape(rows, k), np.ones((rows, k), dtype=np.float32)
    size = f"{rows} tokens, {k} experts each, {cols}"
    moved, out = empty(rows * k, cols), empty(rows, cols)
    gather = ("mswift_gather_rows", 1, x, index, moved, rows * k, cols)
    yield meter.cost("permute", size, lambda e: e.call(*gather, out=(moved,)), 4 * rows * k * cols + 8 * rows * k)
    combine = ("mswift_combine_rows", 1, x, index, weights, out, rows, k, cols)
    yield meter.cost("unpermute", size, lambda e: e.call(*combine, out=(out,)), 2 * rows * (k + 1) * cols + 12 * rows * k)
    dweights = unwritten(rows, k)
    back = ("mswift_combine_rows_backward", 1, out, x, index, weights, moved, dweights, rows, k, cols)
    yield meter.cost("its gradients", size, lambda e: e.call(*back, out=(moved, dweights)), 2 * rows * (2 * k + 1) * cols + 16 * rows * k)


def lora(meter: Meter) -> Iterator[Cost]:
    rows, inside, outside, rank = 128, 2048, 2048, 16
    x, weight, a, b = half(rows, inside), half(outside, inside), half(rank, inside), half(outside, rank)
    low, y, sizes = empty(rows, rank), empty(rows, outside), {"rows": rows}

    def forward(e: Emulator) -> None:
        e.call("mswift_linear", linear(x=x, weight=a, out=low, n=rank, k=inside, x_stride=inside, thin=1, **sizes), out=(low,))
        e.call("mswift_linear", linear(x=x, weight=weight, low=low, up=b, out=y, n=outside, k=inside, rank=rank, x_stride=inside, **sizes), out=(y,))

    size = f"{rows} x {inside} -> {outside}, rank {rank}"
    least = 2 * (rows * (inside + outside) + inside * outside + rank * (rows + inside + outside))
    yield meter.cost("linear with LoRA", size, forward, least, 2 * rows * (inside * outside + rank * (inside + outside)))


def lora_gradients(meter: Meter) -> Iterator[Cost]:
    """Of the rank that fills the tiles: at 16, where they do four times the adapter's operations, these are 3 % of the layer's."""
    rows, inside, outside, rank = 128, 2048, 2048, 64
    x, weight, dy = half(rows, inside), half(outside, inside), half(rows, outside)
    a, b, low = half(rank, inside), half(outside, rank), half(rows, rank)
    dlow, dx, da, db, sizes = empty(rows, rank), empty(rows, inside), unwritten(rank, inside), unwritten(outside, rank), {"rows": rows}

    def to_input(e: Emulator) -> None:
        e.call("mswift_linear", linear(x=dy, weight=b, out=dlow, n=rank, k=outside, x_stride=outside, thin=1, columns=1, **sizes), out=(dlow,))
        fields = {"x": dy, "weight": weight, "low": dlow, "up": a, "out": dx, "n": inside, "k": outside, "rank": rank, "x_stride": outside}
        e.call("mswift_linear", linear(**fields, columns=1, **sizes), out=(dx,))

    def to_factors(e: Emulator) -> None:
        e.call("mswift_outer", outer(a=dlow, b=x, out=da, m=rank, n=inside, a_stride=rank, b_stride=inside, **sizes), out=(da,))
        e.call("mswift_outer", outer(a=dy, b=low, out=db, m=outside, n=rank, a_stride=outside, b_stride=rank, **sizes), out=(db,))

    size, adapter = f"{rows} x {inside} -> {outside}, rank {rank}", 2 * rows * rank * (inside + outside)
    least = 2 * (rows * (inside + outside) + inside * outside + rank * (rows + inside + outside))
    yield meter.cost("its input's gradient", size, to_input, least, 2 * rows * inside * outside + adapter)
    least = 2 * rows * (inside + outside + 2 * rank) + 4 * rank * (inside + outside)
    yield meter.cost("its factors' gradients", size, to_factors, least, adapter)


def dora(meter: Meter) -> Iterator[Cost]:
    """The factor of each output in the same pass; the sum without it is kept for the factor's gradient."""
    rows, inside, outside, rank = 128, 1536, 1536, 16
    x, weight, a, b, bias = half(rows, inside), half(outside, inside), half(rank, inside), half(outside, rank), half(outside)
    low, y, inner, factor = empty(rows, rank), empty(rows, outside), empty(rows, outside), np.ones(outside, dtype=np.float32)
    down = linear(x=x, weight=a, out=low, rows=rows, n=rank, k=inside, x_stride=inside, thin=1)
    fields = given(x=x, weight=weight, low=low, up=b, bias=bias, column_scale=factor, out=y, inner=inner, rows=rows, n=outside, k=inside, rank=rank)

    def forward(e: Emulator) -> None:
        e.call("mswift_linear", down, out=(low,))
        e.call("mswift_linear", linear(**fields, x_stride=inside), out=(y, inner))

    least = 2 * (rows * (inside + 2 * outside) + inside * outside + rank * (inside + outside + rows) + outside) + 4 * outside
    flops = 2 * rows * (inside * outside + rank * (inside + outside))
    yield meter.cost("linear with DoRA", f"{rows} x {inside} -> {outside}, rank {rank}", forward, least, flops)


def quantised(meter: Meter) -> Iterator[Cost]:
    rows, inside, outside = 128, 1024, 1024
    x, y = half(rows, inside), empty(rows, outside)
    for name, kind, block, codes in (("nf4", abi.NF4, 64, inside * outside // 2), ("int8", abi.INT8, 0, inside * outside)):
        weight = np.random.default_rng(0).integers(0, 127, size=codes).astype(np.uint8)
        scales = np.ones(inside * outside // block if block else outside, dtype=np.float32)
        fields = given(
            x=x, weight=weight, weight_scales=scales, rows=rows, n=outside, k=inside, x_stride=inside, weight_kind=kind, weight_block=block
        )
        least = 2 * rows * (inside + outside) + codes + scales.nbytes
        for direction, columns in (("", 0), (", gradient of its input", 1)):
            structure = linear(**fields, out=y, columns=columns)
            run = functools.partial(once, "mswift_linear", structure, y)
            yield meter.cost(f"linear, {name}{direction}", f"{rows} x {inside} -> {outside}", run, least, 2 * rows * inside * outside)


def experts(meter: Meter) -> Iterator[Cost]:
    """Weights that lie apart, each at a place of its own."""
    counts, inside, outside = (120, 125, 128, 118), 512, 512
    rows, groups, offsets = sum(counts), len(counts), np.cumsum((0, *counts))
    x, dy, y, dx, dweight = half(rows, inside), half(rows, outside), empty(rows, outside), empty(rows, inside), empty(groups, outside, inside)
    table, weights = apart(half(groups, outside, inside))
    common = given(offsets=offsets, groups=groups, rows=rows)
    size, flops = f"{groups} experts x {rows / groups:.0f} rows, {inside} -> {outside}", 2 * rows * inside * outside
    least = 2 * (rows * (inside + outside) + groups * inside * outside) + 8 * (2 * groups + 1)
    for name, source, out, columns in (("linear of experts", x, y, 0), ("gradient of its input", dy, dx, 1)):
        structure = linear(
            x=source, weight_table=table, out=out, n=out.shape[1], k=source.shape[1], x_stride=source.shape[1], columns=columns, **common
        )
        structure.arrays += weights
        yield meter.cost(name, size, functools.partial(once, "mswift_linear", structure, out), least, flops)
    structure = outer(a=dy, b=x, out=dweight, m=outside, n=inside, a_stride=outside, b_stride=inside, out_dtype=1, **common)
    yield meter.cost("gradient of its weights", size, lambda e: e.call("mswift_outer", structure, out=(dweight,)), least - 8 * groups, flops)


def in_parts(meter: Meter) -> Iterator[Cost]:
    """Where one product has too few tiles for a device its rows are shared out, and the parts go through memory."""
    rows, rank, inside = 4400, 64, 256
    a, b, out, splits = half(rows, rank), half(rows, inside), empty(rank, inside), abi.splits_of(rows, rank, inside, 2)
    partial = unwritten(splits, rank, inside)
    fields = given(a=a, b=b, out=out, partial=partial, rows=rows, m=rank, n=inside, a_stride=rank, b_stride=inside, splits=splits, out_dtype=1)
    name, flops, least = f"gradient of an adapter, {splits} parts", 2 * rows * rank * inside, 2 * (rows * (rank + inside) + rank * inside)
    yield meter.cost(name, f"{rows} x {inside}, rank {rank}", lambda e: e.call("mswift_outer", outer(**fields), out=(out, partial)), least, flops)


def heads_on_chip(meter: Meter) -> Iterator[Cost]:
    return head_of(meter, 256, 256, 3072)


def heads_by_groups(meter: Meter) -> Iterator[Cost]:
    return head_of(meter, 128, 768, 6144)


def head_of(meter: Meter, tokens: int, hidden: int, vocab: int) -> Iterator[Cost]:
    """By the kernels that a head of this hidden size takes."""
    functions = meter.emulator.functions
    x, weight, labels = half(tokens, hidden), rounded(wide(half(vocab, hidden)) / hidden**0.5), np.arange(tokens)
    structure = head(x=x, weight=weight, labels=labels, tokens=tokens, hidden=hidden, vocab=vocab, size=vocab)
    stats, partial, acc = unwritten(5, tokens), unwritten(8, 5, tokens), unwritten(tokens, hidden)
    size, product, least = f"{tokens} x {hidden}, vocabulary {vocab}", 2 * tokens * hidden * vocab, 2 * hidden * (tokens + vocab) + 28 * tokens
    lse, coefficients, dweight = np.full(tokens, 10, dtype=np.float32), np.ones((4, tokens), dtype=np.float32), empty(vocab, hidden)
    outputs: tuple[np.ndarray, ...] = (stats, acc, partial, dweight)
    if functions["mswift_head_on_chip"](hidden):
        statistics = ("mswift_head_statistics", structure, stats, partial, 8)
        yield meter.cost("loss, forward only", size, lambda e: e.call(*statistics, out=outputs), least, product)
        sweep: tuple[Any, ...] = ("mswift_head_sweep_on_chip", structure, stats, acc, None, None, 1)
        back: tuple[Any, ...] = ("mswift_head_gradient_on_chip", structure, lse, coefficients, None, None, 1, dweight, 1, 0, None)
    else:
        groups = min((tokens + abi.CHUNK - 1) // abi.CHUNK, functions["mswift_head_groups"](hidden))
        work = unwritten(groups * functions["mswift_head_group"](hidden) * abi.HEAD_WORKSPACE, dtype=np.uint8)
        sweep = ("mswift_head_sweep", structure, stats, acc, partial, None, 1, work, groups)
        back = ("mswift_head_gradient", structure, lse, coefficients, None, None, 1, dweight, 1, 0, None, work, groups)
        outputs += (work,)
    yield meter.cost("loss and input gradient", size, lambda e: e.call(*sweep, out=outputs), least + 4 * tokens * hidden, 2 * product)
    least += 2 * vocab * hidden
    yield meter.cost("weight gradient, trained head", size, lambda e: e.call(*back, out=outputs), least, 2 * product)


def table() -> list[Cost]:
    meter = Meter()
    parts = (norms, element_wise, lora, lora_gradients, dora, quantised, experts, in_parts, heads_on_chip, heads_by_groups)
    return [cost for part in parts for cost in part(meter)]


if __name__ == "__main__":
    print(HEADER[0], *(cost.row() for cost in table()), "", HEADER[1], sep="\n")
