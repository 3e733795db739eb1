"""The bookkeeping of the cache, without a model: what is kept, what is hidden, how it grows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.rollout.cache import KeyValueCache

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(first=TOKENS, second=TOKENS)
def test_one_prompt_keeps_the_longest_common_beginning(first: list[int], second: list[int]) -> None:
    cache = KeyValueCache()
    assert cache.begin([first], None) == 0
    cache.prepare(len(first), 8)
    cache.advance(torch.tensor([first]))
    kept = cache.begin([second], None)
    assert first[:kept] == second[:kept]
    assert kept < len(second)
    assert kept in (len(first), len(second) - 1) or first[kept] != second[kept]
    assert (cache.length, cache.tokens) == (kept, second[:kept])


def test_a_batch_keeps_nothing_and_leaves_nothing_behind() -> None:
    cache = KeyValueCache()
    cache.begin([[1, 2]], None)
    cache.prepare(2, 4)
    cache.advance(torch.tensor([[1, 2]]))
    assert cache.begin([[1, 2], [1, 2]], None) == 0
    cache.prepare(2, 4)
    cache.advance(torch.tensor([[1, 2], [1, 2]]))
    cache.keep_rows([1])
    cache.advance(torch.tensor([[3]]))
    assert (cache.length, cache.tokens) == (3, None)
    assert cache.begin([[1, 2, 3, 4]], None) == 0


def test_growing_keeps_what_is_filled() -> None:
    cache = KeyValueCache()
    cache.begin([[0] * 200], None)
    context = cache.prepare(200, 1000)
    assert context.max_sequence_length == 512
    keys, values = torch.randn(512, 1, 2, 4), torch.randn(512, 1, 2, 4)
    context.key_value_memory_dict[3] = (keys, values)
    cache.advance(torch.zeros(1, 200, dtype=torch.int64))
    assert cache.prepare(312, 1000) is context
    grown = cache.prepare(313, 1000)
    assert (grown.max_sequence_length, grown.sequence_len_offset) == (1024, 200)
    assert torch.equal(grown.key_value_memory_dict[3][0][:200], keys[:200])
    assert torch.equal(grown.key_value_memory_dict[3][1][:200], values[:200])


def test_padding_is_hidden_but_from_itself() -> None:
    cache = KeyValueCache()
    cache.begin([[1, 2, 3], [1]], torch.tensor([0, 2]))
    first, second = cache.hidden(3)[:, 0].tolist()  # type: ignore[index]
    assert first == [[False] * 3] * 3
    assert second == [[False, True, False], [True, False, False], [True, True, False]]
    cache.advance(torch.zeros(2, 3, dtype=torch.int64))
    assert cache.hidden(1)[:, 0].tolist() == [[[False] * 4], [[True, True, False, False]]]  # type: ignore[index]
    cache.keep_rows([1])
    assert cache.hidden(1).shape == (1, 1, 1, 4)  # type: ignore[union-attr]


def test_decode_mode_is_one_token_after_the_prompt() -> None:
    cache = KeyValueCache()
    cache.begin([[1, 2]], None)
    assert not cache.prepare(2, 10).is_decode_only()
    cache.advance(torch.tensor([[1, 2]]))
    assert cache.prepare(1, 10).is_decode_only()
    assert not cache.prepare(2, 10).is_decode_only()
