"""Rules: each makes the megatron tensor that a few lines of torch make by hand, and gives every HF row back once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.conversion.rules import Drop, FusedGateUp, FusedQKV, GroupedBlocks, PaddedRows, Rename, Rule, TiedHead
from mswift.errors import ConversionError

SMALL = st.integers(1, 5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def to_megatron(rule: Rule, sources: dict[str, torch.Tensor]) -> torch.Tensor:
    """The whole parameter, read off the pieces."""
    like = next(iter(sources.values()))
    pieces = rule.pieces({name: tuple(tensor.shape) for name, tensor in sources.items()})
    return torch.cat([like.new_zeros(p.rows, *like.shape[1:]) if p.source is None else sources[p.source][p.start : p.stop] for p in pieces])


def to_hf(rule: Rule, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """The HF tensors, read off the same pieces backwards; unwritten rows stay NaN."""
    shapes = rule.source_shapes(tuple(whole.shape))
    sources = {name: torch.full(shape, float("nan"), dtype=whole.dtype) for name, shape in shapes.items()}
    at = 0
    for piece in rule.pieces(shapes):
        if piece.source is not None:
            sources[piece.source][piece.start : piece.stop] = whole[at : at + piece.rows]
        at += piece.rows
    assert at == whole.shape[0]
    return sources


def assert_round_trip(rule: Rule, sources: dict[str, torch.Tensor], wanted: torch.Tensor) -> None:
    whole = to_megatron(rule, sources)
    assert torch.equal(whole, wanted)
    back = to_hf(rule, whole)
    assert list(back) == list(rule.sources)
    assert all(torch.equal(back[name], tensor) for name, tensor in sources.items())


@given(SMALL, SMALL, SMALL, st.one_of(st.just(()), st.tuples(SMALL)), DTYPES)
def test_fused_qkv(groups: int, per_group: int, head_dim: int, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    q = torch.randn(groups * per_group * head_dim, *rest).to(dtype)
    k, v = (torch.randn(groups * head_dim, *rest).to(dtype) for _ in "kv")
    by_group = [x.reshape(groups, -1, *rest) for x in (q, k, v)]
    wanted = torch.cat(by_group, dim=1).reshape(-1, *rest)
    rule = FusedQKV("qkv", "q", "k", "v", groups, per_group, head_dim)
    assert_round_trip(rule, {"q": q, "k": k, "v": v}, wanted)
    assert_round_trip(FusedQKV("qkv", "all", "all", "all", groups, per_group, head_dim), {"all": torch.cat((q, k, v))}, wanted)
    with pytest.raises(ConversionError, match=r"qkv has \d+ rows, its rule makes \d+"):
        rule.source_shapes((wanted.shape[0] + 1, *rest))


@given(SMALL, SMALL, SMALL, st.integers(0, 2), st.one_of(st.just(()), st.tuples(SMALL)), DTYPES)
def test_gates_follow_the_queries_of_their_group(
    groups: int, per_group: int, head_dim: int, padding: int, rest: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, gate = (torch.randn(groups, per_group, head_dim, *rest).to(dtype) for _ in range(2))
    k, v = (torch.randn(groups, 1, head_dim, *rest).to(dtype) for _ in "kv")
    wanted = torch.cat((q, gate, k, v), dim=1).reshape(-1, *rest)
    wanted = torch.cat((wanted, wanted.new_zeros(padding * (2 * per_group + 2) * head_dim, *rest)))
    sources = {"q": torch.stack((q, gate), dim=2).reshape(-1, *rest), "k": k.reshape(-1, *rest), "v": v.reshape(-1, *rest)}
    rule = FusedQKV("qkv", "q", "k", "v", groups, per_group, head_dim, padded_groups=groups + padding, gated=True)
    assert_round_trip(rule, sources, wanted)
    with pytest.raises(ConversionError, match=r"qkv has \d+ rows, its rule makes \d+"):
        rule.source_shapes((wanted.shape[0] + 1, *rest))


@given(st.integers(1, 4), st.lists(st.lists(SMALL, min_size=1, max_size=4), min_size=1, max_size=3), st.sampled_from([(), (3,), (1, 4)]), DTYPES)
def test_grouped_blocks(groups: int, sizes: list[list[int]], rest: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [[torch.randn(groups, rows, *rest).to(dtype) for rows in blocks] for blocks in sizes]
    sources = {f"t{i}": torch.cat(blocks, dim=1).reshape(-1, *rest) for i, blocks in enumerate(tensors)}
    wanted = torch.cat([block.reshape(-1, *rest) for blocks in tensors for block in blocks])
    rule = GroupedBlocks("in_proj", tuple((f"t{i}", tuple(blocks)) for i, blocks in enumerate(sizes)), groups)
    assert_round_trip(rule, sources, wanted)
    with pytest.raises(ConversionError, match=r"in_proj has \d+ rows, its rule makes \d+"):
        rule.source_shapes((wanted.shape[0] + 1, *rest))


@given(SMALL, st.one_of(st.just(()), st.tuples(SMALL)), DTYPES)
def test_fused_gate_up(ffn: int, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (torch.randn(ffn, *rest).to(dtype) for _ in range(2))
    rule = FusedGateUp("fc1", "gate", "up")
    assert rule.parts == 2
    assert_round_trip(rule, {"gate": gate, "up": up}, torch.cat([gate, up]))
    assert_round_trip(FusedGateUp("fc1", "both", "both"), {"both": torch.cat([gate, up])}, torch.cat([gate, up]))
    with pytest.raises(ConversionError, match="even number"):
        rule.source_shapes((2 * ffn + 1, *rest))


@given(SMALL, st.integers(0, 4), SMALL, DTYPES)
def test_padded_rows(vocab: int, padding: int, hidden: int, dtype: torch.dtype) -> None:
    rows = torch.randn(vocab, hidden).to(dtype)
    rule = PaddedRows("embedding", "embed_tokens", vocab, vocab + padding)
    assert_round_trip(rule, {"embed_tokens": rows}, torch.cat([rows, torch.zeros(padding, hidden, dtype=dtype)]))
    with pytest.raises(ConversionError, match="rows"):
        rule.source_shapes((vocab + padding + 1, hidden))
    with pytest.raises(ConversionError, match="rows with padding are fewer than the"):
        PaddedRows("embedding", "embed_tokens", vocab + padding + 1, vocab + padding).source_shapes((vocab + padding, hidden))


@given(st.lists(SMALL, min_size=1, max_size=3))
def test_rename(shape: list[int]) -> None:
    tensor = torch.randn(shape)
    assert_round_trip(Rename("new", "old"), {"old": tensor}, tensor)
    assert Rename("new", "old").source_shapes(tuple(shape)) == {"old": tuple(shape)}


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(ConversionError, match="scale is a scalar"):
        Rename("scale", "old").source_shapes(())


def test_tied_head_reads_the_embedding_and_writes_nothing() -> None:
    rule = TiedHead("output_layer.weight", "model.embed_tokens.weight", 5, 8)
    assert rule.sources == ("model.embed_tokens.weight",)
    assert not rule.exported
    assert not rule.required
    assert PaddedRows("a", "b", 5, 8).exported


def test_drop_matches_whole_names() -> None:
    drop = Drop(r"model\.layers\.\d+\.rotary_emb\.inv_freq", "from the config")
    assert drop.matches("model.layers.12.rotary_emb.inv_freq")
    assert not drop.matches("model.layers.12.rotary_emb.inv_freq.more")
    assert not drop.matches("a.model.layers.12.rotary_emb.inv_freq")


def test_rules_are_values() -> None:
    assert Rename("a", "b") == Rename("a", "b") != Rename("a", "c")
    assert len({FusedGateUp("a", "g", "u"), FusedGateUp("a", "g", "u")}) == 1
    with pytest.raises(AttributeError):
        Rename("a", "b").source = "c"  # type: ignore[misc]
