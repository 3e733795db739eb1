"""Cases of `benchmarks/kernels.py`: linear layers of experts, the way of tokens to them and back, quantised frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

Methods = dict[str, Callable[[], Any]]
EXPERTS = ((64, 16, 256, 1536), (64, 16, 768, 256), (64, 32, 768, 512), (32, 64, 768, 1536), (8, 256, 1024, 2048))
"""Experts, rows of each, columns in and out."""


def _draw(*shape: int, scale: float = 1.0, trained: bool = False) -> Any:
    import torch

    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().requires_grad_(trained)


def experts(sizes: tuple[int, int, int, int], rank: int, dropout: float, compiled: bool) -> Methods:
    """Forward and backward of one frozen linear layer of all experts, bf16, with adapters if there is a rank.

    The limit is one product an expert for each direction, by torch.mm into preallocated rows.
    """
    import torch
    from torch.nn import functional as F

    from mswift.kernels.grouped_linear import grouped_linear, lora_grouped_linear

    count, rows, into, out = sizes
    x, upstream = _draw(count * rows, into, trained=True), _draw(count * rows, out)
    weights = [_draw(out, into, scale=into**-0.5) for _ in range(count)]
    lora_a = [_draw(rank, into, scale=into**-0.5, trained=True) for _ in range(count if rank else 0)]
    lora_b = [_draw(out, rank, trained=True) for _ in range(count if rank else 0)]
    counts, seeds = torch.full((count,), rows), torch.arange(count)

    def step(function: Callable[[], Any]) -> None:
        for tensor in (x, *lora_a, *lora_b):
            tensor.grad = None
        function().backward(upstream)

    def ours() -> Any:
        if not rank:
            return grouped_linear(x, weights, counts)
        return lora_grouped_linear(x, weights, counts, None, lora_a, lora_b, scale=2.0, dropout_p=dropout, seeds=seeds)

    def loop() -> Any:
        parts = list(zip(x.split(rows), weights, strict=True))
        if not rank:
            return torch.cat([F.linear(part, weight) for part, weight in parts])
        return torch.cat(
            [F.linear(p, w) + 2.0 * F.linear(F.linear(F.dropout(p, dropout), a), b) for (p, w), a, b in zip(parts, lora_a, lora_b, strict=True)]
        )

    fixed, forward, back = x.detach(), torch.empty_like(upstream), torch.empty_like(x, requires_grad=False)

    def products() -> None:
        for part, to, grad, to_x, weight in zip(fixed.split(rows), forward.split(rows), upstream.split(rows), back.split(rows), weights, strict=True):
            torch.mm(part, weight.t(), out=to)
            torch.mm(grad, weight, out=to_x)

    methods: Methods = {"ours": partial(step, ours), "limit": products, "one F.linear an expert": partial(step, loop)}
    if compiled:
        methods["torch.compile"] = partial(step, torch.compile(loop))
    return methods


def quantised(into: int, out: int, kind: str, rank: int) -> Methods:
    """Forward and backward of a quantised frozen layer with an adapter, 1024 tokens, bf16; the limit is the layer in bf16 without one."""
    import torch

    from mswift.kernels.quantised_linear import quantise_int8, quantise_nf4, quantised_linear

    x, upstream, whole = _draw(1024, into, trained=True), _draw(1024, out), _draw(out, into, scale=into**-0.5)
    lora_a, lora_b = _draw(rank, into, scale=into**-0.5, trained=True), _draw(out, rank, trained=True)
    weight = quantise_nf4(whole) if kind == "nf4" else quantise_int8(whole)

    def step(function: Callable[[], Any]) -> None:
        x.grad = lora_a.grad = lora_b.grad = None
        function().backward(upstream)

    def dequantised_first() -> Any:
        return torch.nn.functional.linear(x, weight.rows(0, out, torch.bfloat16)) + 2.0 * (x @ lora_a.t()) @ lora_b.t()

    return {
        "ours": partial(step, lambda: quantised_linear(x, weight, None, lora_a, lora_b, scale=2.0)),
        "limit": partial(step, lambda: x @ whole.t()),
        "dequantised by torch, then multiplied": partial(step, dequantised_first),
    }


def cases(compiled: bool) -> Iterator[tuple[str, Callable[[], Methods]]]:
    for sizes in EXPERTS:
        name = f"{sizes[0]}x{sizes[1]}/{sizes[2]}x{sizes[3]}"
        yield f"experts/{name}", partial(experts, sizes, 0, 0.0, compiled)
        for dropout in (0.0, 0.1):
            yield f"lora-experts/{name}/r8/dropout{dropout}", partial(experts, sizes, 8, dropout, compiled)
    for into, out in ((576, 1536), (2048, 8192)):
        for kind in ("nf4", "int8"):
            yield f"quantised/{kind}/{into}x{out}/r16", partial(quantised, into, out, kind, 16)
