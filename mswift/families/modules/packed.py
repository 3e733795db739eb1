"""Rows that lie end to end in one sequence: what megatron-core hands on to every layer, and what our own layers want to know besides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(kw_only=True)
class PackedRows(PackedSeqParams):
    """megatron-core's description of packed rows, on the device, with what would cost a wait for the device to find out again.

    Attributes:
        lengths: tokens of each row. positions: int64 ``[t]``, of each token in its row. row_of: int64 ``[t]``, the row of each token.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    row_of: Tensor


def packed_rows(cu_seqlens: Tensor, device: torch.device) -> PackedRows:
    """The description of rows ``[cu_seqlens[i], cu_seqlens[i + 1])``; `cu_seqlens` is int32 on the CPU."""
    lengths = cu_seqlens.diff()
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].long()[row_of]
    bounds = cu_seqlens.to(device, non_blocking=True)
    longest = int(lengths.max())
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths.tolist()),
        positions=positions.to(device, non_blocking=True),
        row_of=row_of.to(device, non_blocking=True),
    )
