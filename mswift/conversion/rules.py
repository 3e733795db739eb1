"""Rules: how each megatron parameter is made of Hugging Face tensors. Written once, read in both directions.

A rule speaks of whole, unsharded tensors and of nothing else: no ranks, no files, no communication, no direction. It says which rows of
which Hugging Face (HF) tensors, in order, are the rows of one megatron parameter; from that follow loading, exporting, the slices that a
tensor-parallel rank needs (`shards`), the accounting of what is missing or left over (`coverage`) and the form of an adapter (`adapters`).

A rule changes places, never values. A family whose values differ (a norm stored around zero) will wrap a rule in one that keeps its pieces
and adds the pair of maps; `load.fill` and `export` are the only two places that would call them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mswift.errors import ConversionError

Shape = tuple[int, ...]
Parts = int | tuple[int, ...]
"""Blocks of rows, each split over tensor-parallel ranks by itself: so many equal ones, or one of so many rows for each number."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``[start, stop)`` of the HF tensor ``source``; of zeros when ``source`` is None."""

    source: str | None
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Stack:
    """How an HF tensor holds several equal matrices or vectors ("slabs") along dim 0; a piece counts its rows on from one slab to the next.

    Args:
        transposed: it is ``[slabs, columns, rows]`` rather than ``[slabs, rows, columns]``.
        woven: the rows of a slab are that many blocks, of which the tensor holds the first rows of all, then the second of all, and so on.
    """

    transposed: bool = False
    woven: int = 1

    @property
    def plain(self) -> bool:
        """Whether rows of the tensor are rows of the slabs."""
        return not self.transposed and self.woven == 1

    def slab_rows(self, source_shape: Shape) -> int:
        """Rows of one slab, from the shape of the HF tensor."""
        return source_shape[-1] if self.transposed else source_shape[1]


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """Where transformers' model, which holds the weights of all experts of a layer in one parameter, has that of one of them.

    Args:
        module: name of the module that has the parameter. index, count: which expert, of how many.
        parameter: its name; rows of ``gate_up_proj`` are those of gate, then those of up. transposed: matrices are ``[in, out]``.
        declared: the module says itself whether they are (``is_transposed``), which peft heeds from 0.19 on.
        woven: rows of gate and up in turn.
    """

    module: str
    parameter: Literal["gate_up_proj", "down_proj"]
    index: int
    count: int
    transposed: bool = False
    declared: bool = False
    woven: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One megatron parameter, named ``target`` (global layer numbers), as a list of pieces along dim 0; a bias is the 1-D case.

    ``exported``: False for a second copy of a tensor that another rule writes.
    ``required``: False where a model may lack the parameter although the family lists the rule.
    ``slot``: of the weight of one expert. ``module``: of a weight whose module has another name in transformers' model than in a checkpoint.
    """

    target: str
    slot: ExpertSlot | None = field(default=None, kw_only=True)
    module: str | None = field(default=None, kw_only=True)
    exported: ClassVar[bool] = True
    required: ClassVar[bool] = True

    @property
    def parts(self) -> Parts:
        """The blocks of rows that ranks split each by itself."""
        return 1

    @property
    def sources(self) -> tuple[str, ...]:
        """The HF tensors that the rule reads, each once."""
        raise NotImplementedError

    @property
    def source_columns(self) -> int | None:
        """Columns of the HF tensors where megatron's parameter has more, zeros behind them; None where they are equally wide."""
        return None

    @property
    def pads(self) -> bool:
        """Whether a layout may give the parameter zeros behind the rows or columns of its HF tensors."""
        return self.source_columns is not None

    @property
    def stack(self) -> Stack | None:
        """How the HF tensors hold the rows that pieces speak of; None: row by row."""
        return None

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        """The shape of every HF tensor, from that of the whole parameter.

        Raises:
            ConversionError: the rule cannot fill a parameter of this shape.
        """
        raise NotImplementedError

    def pieces(self, source_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        """The rows of the whole parameter in order; ``source_shapes`` as `source_shapes` gives them."""
        raise NotImplementedError

    def _rows(self, target_shape: Shape, wanted: int | None = None) -> int:
        if not target_shape:
            raise ConversionError(f"{self.target} is a scalar; a rule needs at least one dimension")
        if wanted is not None and target_shape[0] != wanted:
            raise ConversionError(f"{self.target} has {target_shape[0]} rows, its rule makes {wanted}; the model and its rules disagree")
        return target_shape[0]


@dataclass(frozen=True, slots=True)
class Rename(Rule):
    """The same tensor under another name.

    Args:
        source: HF name. columns: width of the HF tensor where megatron's is wider (padded query groups feed zeros into it); None: equal.
    """

    source: str
    columns: int | None = None

    @property
    def source_columns(self) -> int | None:
        return self.columns

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        self._rows(target_shape)
        return {self.source: target_shape if self.columns is None else (target_shape[0], self.columns, *target_shape[2:])}

    def pieces(self, source_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        return (Piece(self.source, 0, source_shapes[self.source][0]),)


@dataclass(frozen=True, slots=True)
class FusedQKV(Rule):
    """Query, key and value projections in megatron's order: per query group ``[its query heads; their gates; its key head; its value head]``.

    Args:
        q, k, v: HF names; rows are ``num_groups * heads_per_group * head_dim`` for q and ``num_groups * head_dim`` for k and v. Three times
            the same name: one tensor ``[all of q; all of k; all of v]``.
        num_groups: key/value heads. heads_per_group: query heads that share one. head_dim: rows a head.
        padded_groups: groups that megatron's parameter has, zeros from ``num_groups`` on; None: no padding.
        gated: q has twice the rows, ``[query; gate]`` for each head; not where the three are one tensor.
    """

    q: str
    k: str
    v: str
    num_groups: int
    heads_per_group: int
    head_dim: int
    padded_groups: int | None = None
    gated: bool = False

    @property
    def packed(self) -> bool:
        """Whether q, k and v are one HF tensor."""
        return self.q == self.k

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.q,) if self.packed else (self.q, self.k, self.v)

    @property
    def pads(self) -> bool:
        return True

    @property
    def _query_rows(self) -> int:
        """Rows of one group's query heads and of their gates, if they have any."""
        return self.heads_per_group * self.head_dim * (2 if self.gated else 1)

    @property
    def _padding_rows(self) -> int:
        return ((self.padded_groups or self.num_groups) - self.num_groups) * (self._query_rows + 2 * self.head_dim)

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        kv_rows = self.num_groups * self.head_dim
        q_rows = self.num_groups * self._query_rows
        self._rows(target_shape, q_rows + 2 * kv_rows + self._padding_rows)
        rest = target_shape[1:]
        if self.packed:
            return {self.q: (q_rows + 2 * kv_rows, *rest)}
        return {self.q: (q_rows, *rest), self.k: (kv_rows, *rest), self.v: (kv_rows, *rest)}

    def pieces(self, source_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        if self.gated:
            return self._gated_pieces()
        q_step, kv_step = self._query_rows, self.head_dim
        kv_rows = self.num_groups * kv_step
        offsets = (0, q_step * self.num_groups, q_step * self.num_groups + kv_rows) if self.packed else (0, 0, 0)
        steps = tuple(zip((self.q, self.k, self.v), (q_step, kv_step, kv_step), offsets, strict=True))
        real = [Piece(name, at + group * step, at + (group + 1) * step) for group in range(self.num_groups) for name, step, at in steps]
        return self._padded(real)

    def _gated_pieces(self) -> tuple[Piece, ...]:
        real, size = [], self.head_dim
        for group in range(self.num_groups):
            heads = range(group * self.heads_per_group, (group + 1) * self.heads_per_group)
            real += [Piece(self.q, (2 * head + part) * size, (2 * head + part + 1) * size) for part in (0, 1) for head in heads]
            real += [Piece(name, group * size, (group + 1) * size) for name in (self.k, self.v)]
        return self._padded(real)

    def _padded(self, real: list[Piece]) -> tuple[Piece, ...]:
        return (*real, Piece(None, 0, self._padding_rows)) if self._padding_rows else tuple(real)


@dataclass(frozen=True, slots=True)
class FusedGateUp(Rule):
    """Gate and up projections of a gated MLP: ``[gate; up]`` as a whole, ``[gate_i; up_i]`` on tensor-parallel rank i.

    Args:
        gate, up: HF names; twice the same name: one tensor ``[gate; up]``.
    """

    gate: str
    up: str

    @property
    def parts(self) -> Parts:
        return 2

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.gate,) if self.gate == self.up else (self.gate, self.up)

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        rows = self._rows(target_shape)
        if rows % 2:
            raise ConversionError(f"{self.target} has {rows} rows, its rule makes an even number (gate and up)")
        if self.gate == self.up:
            return {self.gate: target_shape}
        half = (rows // 2, *target_shape[1:])
        return {self.gate: half, self.up: half}

    def pieces(self, source_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        return tuple(Piece(name, 0, source_shapes[name][0]) for name in self.sources)


@dataclass(frozen=True, slots=True)
class GroupedBlocks(Rule):
    """Blocks of unequal size, each split over tensor-parallel ranks by itself; the HF tensors have them group by group.

    Args:
        tensors: ``(HF name, rows that one group has of each of its blocks)``; megatron's parameter is all blocks of the first, of the second, ...
        groups: how often an HF tensor repeats ``[its blocks]``; with 1 it has its blocks whole, one after the other.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int = 1

    @property
    def parts(self) -> Parts:
        return tuple(self.groups * rows for _, blocks in self.tensors for rows in blocks)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.tensors)

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        rows = {name: self.groups * sum(blocks) for name, blocks in self.tensors}
        self._rows(target_shape, sum(rows.values()))
        return {name: (count, *target_shape[1:]) for name, count in rows.items()}

    def pieces(self, source_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        found = []
        for name, blocks in self.tensors:
            for index, rows in enumerate(blocks):
                starts = (group * sum(blocks) + sum(blocks[:index]) for group in range(self.groups))
                found += [Piece(name, start, start + rows) for start in starts]
        return tuple(found)


@dataclass(frozen=True, slots=True)
class PaddedRows(Rule):
    """A tensor with one row a token or a head; megatron's has zero rows from ``rows`` to ``padded_rows`` so that ranks divide it."""

    source: str
    rows: int
    padded_rows: int

    @property
    def pads(self) -> bool:
        return True

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        if self.padded_rows < self.rows:
            raise ConversionError(f"{self.target}: {self.padded_rows} rows with padding are fewer than the {self.rows} without")
        self._rows(target_shape, self.padded_rows)
        return {self.source: (self.rows, *target_shape[1:])}

    def pieces(self, source_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        real, padding = Piece(self.source, 0, self.rows), Piece(None, 0, self.padded_rows - self.rows)
        return (real, padding) if padding.rows else (real,)


@dataclass(frozen=True, slots=True)
class TiedHead(PaddedRows):
    """The output layer of a tied model: a copy of the embedding, which the last of several pipeline stages holds; never exported."""

    exported: ClassVar[bool] = False
    required: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Slab(Rule):
    """A parameter that is one of the slabs of an HF tensor, such as one expert's where a tensor holds those of all.

    Args:
        source: HF name. index, count: which slab, of how many. transposed: slabs are stored ``[in, out]``.
    """

    source: str
    index: int
    count: int
    transposed: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def stack(self) -> Stack:
        return Stack(self.transposed)

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        self._rows(target_shape)
        return {self.source: (self.count, *(reversed(target_shape) if self.transposed else target_shape))}

    def pieces(self, source_shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
        rows = self.stack.slab_rows(source_shapes[self.source])
        return (Piece(self.source, self.index * rows, (self.index + 1) * rows),)


@dataclass(frozen=True, slots=True)
class GatedSlab(Slab):
    """The same of a fused gate and up projection; ``woven``: the HF tensor has their rows in turn, gate first."""

    woven: bool = False

    @property
    def parts(self) -> Parts:
        return 2

    @property
    def stack(self) -> Stack:
        return Stack(self.transposed, 2 if self.woven else 1)

    def source_shapes(self, target_shape: Shape) -> dict[str, Shape]:
        if self._rows(target_shape) % 2:
            raise ConversionError(f"{self.target} has {target_shape[0]} rows, its rule makes an even number (gate and up)")
        return Slab.source_shapes(self, target_shape)


@dataclass(frozen=True, slots=True)
class Drop:
    """HF tensors that have no counterpart and are left out.

    Args:
        pattern: regular expression that a whole HF name matches.
        reason: why nothing is lost, for the reader of the rules.
        equals: an HF tensor that a dropped one must equal bit for bit, as the head of a tied model its embedding.
        told: something is lost after all: whoever loads is told how many tensors, and the reason, which then says what they are.
    """

    pattern: str
    reason: str
    equals: str | None = None
    told: bool = False

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


AnyRule = Rule | Drop
