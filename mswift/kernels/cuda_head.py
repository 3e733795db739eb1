"""The vocabulary's head on CUDA: what `mswift::linear_softmax` and `mswift::linear_softmax_grad_weight` say, bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from mswift.kernels import cuda_abi as abi
from mswift.kernels.cuda import Library, dtype_of, pointer

_BLOCKS = 132
"""About as many multiprocessors does a large device have: so many blocks are started where each fills one."""
_LOWEST = -1e30


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: int, scale: float, cap: float, *, without_label: int
) -> abi.Head:
    """Labels count from the first row that is here."""
    sizes = {"tokens": len(hidden), "hidden": hidden.shape[1], "vocab": weight.shape[0], "first": 0, "size": valid}
    pointers = {"x": pointer(hidden), "weight": pointer(weight), "bias": pointer(bias), "labels": pointer(labels)}
    return abi.Head(**pointers, **sizes, scale=scale, softcap=cap, without_label=without_label)


def _dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    if not hidden.dtype == weight.dtype == torch.bfloat16 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        got = f"hidden {list(hidden.shape)} {hidden.dtype}, weight {list(weight.shape)} {weight.dtype}, labels {list(labels.shape)}"
        raise RuntimeError(f"linear_softmax: wanted bfloat16 hidden [tokens, n], weight [rows, n] and labels [tokens], got {got}")
    if labels.dtype != torch.int64:
        raise RuntimeError(f"labels: got {labels.dtype}, wanted int64")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in (torch.bfloat16, torch.float32)):
        raise RuntimeError(f"bias: got {list(bias.shape)} {bias.dtype}, wanted float32 or bfloat16 [{len(weight)}]")
    if not 0 <= valid <= len(weight):
        raise RuntimeError(f"valid: got {valid}, wanted 0 to {len(weight)}, the rows of the weight")
    return hidden.contiguous(), weight.contiguous(), None if bias is None else bias.float().contiguous(), labels.contiguous()


def linear_softmax(
    library: Library, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: int, scale: float, cap: float, gradient: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics fp32 ``[4, tokens]`` over all valid rows but the label's, and the rows averaged under them: see `linear_softmax.Statistics`."""
    hidden, weight, bias, labels = _dense(hidden, weight, bias, labels, valid)
    tokens, width = hidden.shape
    head = _head(hidden, weight, bias, labels, valid, scale, cap, without_label=1)
    stats = hidden.new_empty(5, tokens, dtype=torch.float32)
    mean, mean2 = (hidden.new_empty(tokens if gradient >= level else 0, width, dtype=torch.float32) for level in (1, 2))
    if not scale:  # all logits are equal: no distance from their maximum
        mean2.zero_()
    if gradient and library.ask("mswift_head_on_chip", hidden, width):
        _sweep_on_chip(library, head, hidden, stats, mean, mean2, scale)
    elif gradient:
        _sweep_by_groups(library, head, hidden, stats, mean, mean2, scale)
    else:
        splits = max(1, min(64, 432 // max(1, (tokens + abi.CHUNK - 1) // abi.CHUNK), (weight.shape[0] + abi.CHUNK - 1) // abi.CHUNK))
        library.call("mswift_head_statistics", hidden, head, stats, hidden.new_empty(splits, 5, tokens, dtype=torch.float32), splits)
    top, others, label, spread, _ = stats
    here = (labels >= 0) & (labels < valid)
    named = (top.clamp_min(_LOWEST), others, spread, label.masked_fill(~here, -torch.inf))
    return torch.stack(named), mean, mean2


def _sweep_on_chip(library: Library, head: abi.Head, hidden: Tensor, stats: Tensor, mean: Tensor, mean2: Tensor, scale: float) -> None:
    tokens, width = hidden.shape
    splits = max(1, min(32, _BLOCKS // max(1, (tokens + 63) // 64)))
    partial = hidden.new_empty(splits, 5, tokens, dtype=torch.float32) if splits > 1 else None
    parts = hidden.new_empty(splits, tokens, width, dtype=torch.float32) if splits > 1 else None
    library.call("mswift_head_sweep_on_chip", hidden, head, stats, mean, partial, parts, splits)
    if len(mean2) and scale:
        library.call("mswift_head_gradient_on_chip", hidden, head, *_distance(stats, scale), mean2, parts, splits, None, 0, 0, None)


def _distance(stats: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What makes of the gradient sums of exp(z - maximum) (z - maximum)."""
    distance = torch.zeros_like(stats[:4])
    distance[2] = 1.0 / scale
    return stats[0].clamp_min(_LOWEST), distance


def _workspace(library: Library, hidden: Tensor) -> tuple[int, int, Tensor]:
    """How many groups of blocks the device holds at once, of how many blocks, and what they pass each other through."""
    groups, group = (library.ask(name, hidden, hidden.shape[1]) for name in ("mswift_head_groups", "mswift_head_group"))
    return groups, group, hidden.new_empty(groups * group * abi.HEAD_WORKSPACE, dtype=torch.uint8)


def _shares(tiles: int, groups: int, steps: int) -> int:
    """Into how many parts the vocabulary is cut so that few groups idle in the last round; each part costs a sum of all tokens."""
    return min(range(1, max(2, min(8, steps) + 1)), key=lambda parts: -(-tiles * parts // max(1, groups)) / parts + 0.02 * parts)


def _sweep_by_groups(library: Library, head: abi.Head, hidden: Tensor, stats: Tensor, mean: Tensor, mean2: Tensor, scale: float) -> None:
    tokens, width = hidden.shape
    groups, group, workspace = _workspace(library, hidden)
    splits = _shares((tokens + abi.CHUNK - 1) // abi.CHUNK, groups, head.vocab // (abi.CHUNK * max(1, group)))
    partial = hidden.new_empty(splits * group, 5, tokens, dtype=torch.float32)
    parts = hidden.new_empty(splits, tokens, width, dtype=torch.float32) if splits > 1 else None
    library.call("mswift_head_sweep", hidden, head, stats, mean, partial, parts, splits, workspace, groups)
    if len(mean2) and scale:
        last = (mean2, parts, splits, None, 0, 0, None, workspace, groups)
        library.call("mswift_head_gradient", hidden, head, *_distance(stats, scale), *last)


def linear_softmax_grad_weight(
    library: Library, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, valid: int, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias for the gradient p (a - b z) + g [row is the label] of a logit z; `factors`: log-sum-exp, a, b, g."""
    hidden, weight, bias, labels = _dense(hidden, weight, bias, labels, valid)
    if factors.shape != (4, len(hidden)) or factors.dtype != torch.float32:
        raise RuntimeError(f"factors: got {list(factors.shape)} {factors.dtype}, wanted float32 [4, {len(hidden)}]")
    lse, a, b, g = factors
    coefficients = torch.stack((g, a - b * lse, -b, torch.zeros_like(g)))
    grad_weight = torch.empty_like(weight)
    grad_bias = hidden.new_empty(0 if bias is None else weight.shape[0], dtype=torch.float32)
    if not len(labels):
        return grad_weight.zero_(), grad_bias.zero_()
    head = _head(hidden, weight, bias, labels, valid, scale, cap, without_label=0)
    into = (grad_weight, dtype_of(weight), 0, None if bias is None else grad_bias)
    if library.ask("mswift_head_on_chip", hidden, hidden.shape[1]):
        library.call("mswift_head_gradient_on_chip", hidden, head, lse.contiguous(), coefficients, None, None, 1, *into)
        return grad_weight, grad_bias
    groups, _, workspace = _workspace(library, hidden)
    library.call("mswift_head_gradient", hidden, head, lse.contiguous(), coefficients, None, None, 1, *into, workspace, groups)
    return grad_weight, grad_bias
