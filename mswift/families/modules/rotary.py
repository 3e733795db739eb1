"""Rotary positions: one table or several, from any inverse frequencies, full or partial, in halves or in neighbouring pairs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn

from mswift.families.base import Rotation
from mswift.families.modules.context import SharedSequence
from mswift.families.modules.packed import PackedRows

_MAX_TABLES = 32


class RotaryTables(nn.Module):
    """Cosines and sines of all positions, for every rotation that some layer of the model uses; stands where GPTModel has its own embedding."""

    get_rotary_seq_len = RotaryEmbedding.get_rotary_seq_len

    def __init__(self, rotations: tuple[Rotation, ...], device: torch.device, sequence: SharedSequence) -> None:
        super().__init__()
        self.rotations, self.device, self.sequence = rotations, device, sequence
        self.length: int | None = None
        self.packed: PackedRows | None = None
        self._known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, max_seq_len: int, offset: int = 0, **_: Any) -> Tensor:
        """fp32 ``[rotations, 2 (cosine, sine), max_seq_len, rotary dim / 2]``.

        Where frequencies depend on the length of the sequence that is `length` if it is set (a prompt: the room for its answer does not
        count), else `max_seq_len`. Where rows are `packed` there is an entry for each token, after its place in its row and by the length of
        this row; where a sequence is spread over context-parallel ranks, an entry for each token here.
        """
        if self.packed is not None:
            return self._packed_table(self.packed)
        tables = self._tables(max_seq_len, self.length or max_seq_len)
        return tables if self.sequence.size == 1 else tables[:, :, self.sequence.places(max_seq_len // self.sequence.size, tables.device)]

    def _packed_table(self, packed: PackedRows) -> Tensor:
        if all(rotation.limit is None or packed.max_seqlen_q <= rotation.limit for rotation in self.rotations):
            return self._tables(packed.max_seqlen_q, packed.max_seqlen_q)[:, :, packed.positions]
        return torch.cat([self._tables(length, length) for length in packed.lengths], dim=2)

    def _tables(self, max_seq_len: int, length: int) -> Tensor:
        key = (max_seq_len, *(rotation.variant(length) for rotation in self.rotations))
        if key not in self._known:
            if len(self._known) == _MAX_TABLES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = torch.stack([self._table(rotation, max_seq_len, length) for rotation in self.rotations])
        return self._known[key]

    def _table(self, rotation: Rotation, positions: int, length: int) -> Tensor:
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), rotation.inv_freq_of(length))
        return torch.stack((angles.cos(), angles.sin())).mul_(rotation.factor).to(self.device)
