"""Causal attention over rows that lie end to end: no query sees another row.

Time and memory grow with the sum of squares of the rows' lengths and not with the square of their sum. Where the compiled kernel does not run
it is plain torch: one call of scaled_dot_product_attention for each row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mswift.kernels import causal_attention, checks


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``softmax(scale * q k^T) v`` in every row by itself, differentiable in all tensors; query head h reads key group h // (heads / groups).

    Args:
        query: ``[t, heads, d]`` or ``[t, groups, heads of each, d]``. key: ``[t, groups, d]``. value: ``[t, groups, dv]``.
        cu_seqlens: int32 ``[rows + 1]``: row i is tokens ``[cu_seqlens[i], cu_seqlens[i + 1])``; it begins with 0 and ends with t. Rows may be empty.
        scale: factor on the scores; None: ``d ** -0.5``.
        window: tokens that a query sees at most, itself included. chunk: rows are cut into chunks of so many tokens, and a query sees its own.
        softcap: limit on the scores, by tanh. sinks: ``[heads]``, a score in each softmax that has no value. dropout_p: of the weights.

    Returns:
        ``[t, heads, dv]`` in the dtype of `query`.
    """
    if key.dim() != 3:
        checks.expect("key", key, ("t", "groups", "d"))
    causal_attention.check(query, key, value, sinks, scale=scale, window=window, chunk=chunk)
    checks.rate("dropout_p", dropout_p)
    checks.expect("cu_seqlens", cu_seqlens, ("rows + 1",))
    checks.rising("cu_seqlens", cu_seqlens, query.shape[0])
    if causal_attention.usable(query, key, value, softcap=softcap, dropout_p=dropout_p):
        limits: dict[str, Any] = {"scale": scale, "window": window, "chunk": chunk, "sinks": sinks}
        return causal_attention.causal_attention(query[:, None], key[:, None], value[:, None], cu_seqlens, **limits)[:, 0]
    query = query.flatten(1, -2)
    lengths = cu_seqlens.diff().tolist()
    parts = [part.transpose(0, 1) for part in (query, key, value)]
    rows = zip(*(part.split(lengths, dim=1) for part in parts))
    outputs = [
        _row(q[None], k[None], v[None], scale, window, chunk, softcap, sinks, dropout_p)[0] if q.shape[1] else _nothing(q, v) for q, k, v in rows
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """One row, ``[1, heads or groups, s, columns]``."""
    length = q.shape[2]
    span = min(limit for limit in (length, window, chunk) if limit is not None)
    if softcap is None and sinks is None:
        gqa = q.shape[1] != k.shape[1]
        if span == length:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale, enable_gqa=gqa)
        visible = _visible(length, span, chunk, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=scale, enable_gqa=gqa)
    return written_out(q, k, v, _visible(length, span, chunk, q.device), scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p)


def _visible(length: int, span: int, chunk: int | None, device: torch.device) -> Tensor:
    """bool ``[length, length]``: True = this query sees that key."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    visible = (distance >= 0) & (distance < span)
    if chunk is not None:
        chunks = positions.div(chunk, rounding_mode="floor")
        visible = visible & (chunks[:, None] == chunks)
    return visible


def _nothing(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], 0, v.shape[-1])


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Attention with a cap on the scores or with sinks, for which torch's own has no place; scores ``[b, heads, sq, sk]`` are stored.

    Args:
        q: ``[b, heads, sq, d]``. k, v: ``[b, groups, sk, d or dv]``. visible: bool, broadcast to ``[b, heads, sq, sk]``; True = may look.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(q, k.transpose(2, 3))
    scores = scores * scale if softcap is None else torch.tanh(scores * (scale / softcap)) * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        offered = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, offered), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]]
    return torch.matmul(F.dropout(weights, dropout_p, dropout_p > 0).to(v.dtype), v)
