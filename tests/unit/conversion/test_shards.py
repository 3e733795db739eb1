"""Shards: for every size that divides, slices of the sources make the shard that slicing the whole makes, and the way back restores each bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.conversion.rules import FusedGateUp, FusedQKV, GroupedBlocks, PaddedRows, Piece, Rename, Rule
from mswift.conversion.shards import Shard, cut_sources, join, source_slices, take
from mswift.errors import ConversionError

SIZES = st.sampled_from([1, 2, 3, 4, 6])
Tensors = dict[str, torch.Tensor]


def assert_shards(rule: Rule, sources: Tensors, whole: torch.Tensor, shards: list[torch.Tensor], dim: int | None) -> None:
    """``shards``: made by hand. Both directions against them."""
    shapes = rule.source_shapes(tuple(whole.shape))
    pieces = rule.pieces(shapes)
    for rank, wanted in enumerate(shards):
        shard = Shard(dim, rank, len(shards))
        assert shard.whole_shape(wanted.shape) == tuple(whole.shape)
        got = torch.full_like(wanted, float("nan"))
        for part in source_slices(pieces, shard, tuple(whole.shape), rule.parts):
            columns = slice(None) if part.columns is None else slice(*part.columns)
            rows = slice(part.start, part.stop)
            value = torch.zeros(part.rows, *wanted.shape[1:]) if part.source is None else sources[part.source][(rows, columns)[: wanted.dim()]]
            got[part.at : part.at + part.rows] = value
        assert torch.equal(got, wanted)
        assert torch.equal(take(whole, shard, rule.parts), wanted)
    back = {name: torch.full(shape, float("nan"), dtype=whole.dtype) for name, shape in shapes.items()}
    for name, row, values in cut_sources(pieces, shards if dim is not None else shards[:1], dim, rule.parts, block_rows=3):
        assert back[name][row : row + len(values)].isnan().all()  # written once
        back[name][row : row + len(values)] = values
    assert all(torch.equal(back[name], tensor) for name, tensor in sources.items())
    assert torch.equal(join(shards, dim, rule.parts), whole)


@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_qkv_rows_are_chunked_even_inside_a_group(size: int, groups: int, per_group: int, unit: int, bias: bool) -> None:
    head_dim = unit * size  # always divides, and groups < size or not a multiple of it occur often
    rest = () if bias else (3,)
    q = torch.randn(groups * per_group * head_dim, *rest)
    k, v = torch.randn(groups * head_dim, *rest), torch.randn(groups * head_dim, *rest)
    whole = torch.cat([x.reshape(groups, -1, *rest) for x in (q, k, v)], dim=1).reshape(-1, *rest)
    rule = FusedQKV("qkv", "q", "k", "v", groups, per_group, head_dim)
    assert_shards(rule, {"q": q, "k": k, "v": v}, whole, list(whole.chunk(size)), 0)


@given(SIZES, st.integers(1, 4), st.integers(1, 4))
def test_gate_and_up_are_split_each_by_itself(size: int, unit: int, hidden: int) -> None:
    gate, up = torch.randn(unit * size, hidden), torch.randn(unit * size, hidden)
    shards = [torch.cat(pair) for pair in zip(gate.chunk(size), up.chunk(size))]
    assert_shards(FusedGateUp("fc1", "gate", "up"), {"gate": gate, "up": up}, torch.cat([gate, up]), shards, 0)


@given(SIZES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_the_input_of_a_delta_net_is_split_block_by_block(size: int, unit: int, keys: int, values: int, per_group: int, packed: bool) -> None:
    """Each rank has its own key heads and the value heads, gates and factors that go with them, in whichever form the checkpoint is."""
    groups, hidden = unit * size, 5
    rows = (keys, keys, per_group * values, per_group * values, per_group, per_group)
    blocks = [torch.randn(groups, count, hidden) for count in rows]
    names = {"qkvz": (0, 1, 2, 3), "ba": (4, 5)} if packed else {"qkv": (0, 1, 2), "z": (3,), "b": (4,), "a": (5,)}
    sources = {
        name: torch.cat([blocks[i] for i in chosen], dim=1).flatten(0, 1) if packed else torch.cat([blocks[i].flatten(0, 1) for i in chosen])
        for name, chosen in names.items()
    }
    repeats = 1 if packed else groups
    rule = GroupedBlocks("in", tuple((name, tuple(rows[i] * repeats for i in chosen)) for name, chosen in names.items()), groups // repeats)
    whole = torch.cat([block.flatten(0, 1) for block in blocks])
    shards = [torch.cat([block.chunk(size)[rank].flatten(0, 1) for block in blocks]) for rank in range(size)]
    assert_shards(rule, sources, whole, shards, 0)


@given(SIZES, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(2, 4))
def test_channels_of_a_convolution(size: int, units: list[int], kernel: int) -> None:
    blocks = [torch.randn(unit * size, 1, kernel) for unit in units]
    shards = [torch.cat(parts) for parts in zip(*(block.chunk(size) for block in blocks))]
    rule = GroupedBlocks("conv", (("conv1d", tuple(len(block) for block in blocks)),))
    assert_shards(rule, {"conv1d": torch.cat(blocks)}, torch.cat(blocks), shards, 0)


@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.data())
def test_vocabulary_padding_may_fill_whole_ranks(size: int, unit: int, hidden: int, data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, unit * size))
    rows = torch.randn(vocab, hidden)
    whole = torch.cat([rows, torch.zeros(unit * size - vocab, hidden)])
    assert_shards(PaddedRows("e", "embed", vocab, unit * size), {"embed": rows}, whole, list(whole.chunk(size)), 0)


@given(SIZES, st.integers(1, 4), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_columns(size: int, unit: int, rows: int, dtype: torch.dtype) -> None:
    whole = torch.randn(rows, unit * size).to(dtype)
    assert_shards(Rename("fc2", "down"), {"down": whole}, whole, list(whole.chunk(size, dim=1)), 1)


@given(SIZES, st.integers(1, 9))
def test_whole_on_every_rank(size: int, rows: int) -> None:
    whole = torch.randn(rows)
    assert_shards(Rename("norm", "old"), {"old": whole}, whole, [whole] * size, None)


def test_shard_from_the_attributes_of_megatron() -> None:
    parameter = torch.nn.Parameter(torch.empty(4, 6))
    assert Shard.of(parameter, 1, 2) == Shard(None, 1, 2)
    parameter.tensor_model_parallel, parameter.partition_dim = True, 1  # type: ignore[attr-defined]
    assert Shard.of(parameter, 1, 2) == Shard(1, 1, 2)
    parameter.tensor_model_parallel, parameter.partition_dim = False, -1  # type: ignore[attr-defined]
    assert Shard.of(parameter, 0, 2) == Shard(None, 0, 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConversionError, match="6 rows in 2 part"):
        source_slices([Piece("a", 0, 6)], Shard(0, 0, 2), (6, 2), parts=2)
    with pytest.raises(ConversionError, match=r"6 rows in \(4, 2\) part\(s\) do not divide over 4"):
        source_slices([Piece("a", 0, 6)], Shard(0, 0, 4), (6, 2), parts=(4, 2))
    with pytest.raises(ConversionError, match=r"6 rows are not those of \(4, 4\) part"):
        take(torch.zeros(6, 2), Shard(0, 0, 2), (4, 4))
    with pytest.raises(ConversionError, match="5 columns"):
        source_slices([Piece("a", 0, 6)], Shard(1, 0, 2), (6, 5))
    with pytest.raises(ConversionError, match="pieces have 6 rows, the parameter 8"):
        source_slices([Piece("a", 0, 6)], Shard(), (8, 2))
    for wrong in ((0, 2, 2), (0, -1, 2), (2, 0, 1)):
        with pytest.raises(ConversionError, match="shard"):
            Shard(*wrong)
