"""Keys and values of what was computed, in megatron-core's own inference context: it grows, drops rows, and is reused from turn to turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext  # the only import of it: the path differs between releases
from torch import Tensor

_BLOCK = 256  # positions; capacities are multiples of it, so that few different rotary tables are made


class CacheContext(StaticInferenceContext):
    """megatron-core's own context with what our attention needs to know besides.

    Attributes:
        left_padding: int64 ``[rows]``, positions at the left of each row that are no tokens; None: no row has any.
        rotary_length: tokens that decide which rotary frequencies hold, where they depend on the length.
        states: what layers without keys remember of all positions so far, by layer number; every tensor has the rows first.
        next_states: what they will remember once the positions at hand are done.
    """

    left_padding: Tensor | None = None
    rotary_length: int = 1

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        super().__init__(max_batch_size, max_sequence_length)
        self.states: dict[int, tuple[Tensor, ...]] = {}
        self.next_states: dict[int, tuple[Tensor, ...]] = {}


class KeyValueCache:
    """A static inference context whose size follows the need.

    megatron-core's layers write their keys (after rotation) and values ``[position, row, group, dim]`` into it and read all up to the last one.

    Attributes:
        length: positions that are filled. prompt_length: of the longest prompt that was begun with.
        padding: int64 ``[rows]``, positions at the left of each row that are no tokens; None: no row has any.
        tokens: the tokens behind the filled positions, known for one row without padding.

    Args:
        recurrent: some layer of the model, on whichever rank, has a state in the place of keys.
    """

    def __init__(self, *, recurrent: bool = False) -> None:
        self.recurrent = recurrent
        self.clear()

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.context: Any = CacheContext(0, 0)
        self.length = 0
        self.prompt_length = 1
        self.tokens: list[int] | None = []
        self.padding: Tensor | None = None

    def begin(self, prompts: Sequence[Sequence[int]], padding: Tensor | None) -> int:
        """Make ready for new prompts.

        Returns:
            How many positions of them are there already: for one prompt its longest common beginning with what was computed last, its last
            token left out, else 0. A state cannot go back: there it is all that was computed, or nothing.
        """
        kept = 0
        if len(prompts) == 1 and self.context.max_batch_size == 1:
            kept = _common_prefix(self.tokens or [], prompts[0][:-1])
            if self.recurrent and kept < self.length:
                kept, self.context.states = 0, {}
        else:
            self.clear()
            self.context = CacheContext(len(prompts), 0)
        self.length, self.padding, self.prompt_length = kept, padding, max(len(prompt) for prompt in prompts)
        self.tokens = list(prompts[0][:kept]) if len(prompts) == 1 else None
        return kept

    def prepare(self, new: int, limit: int) -> Any:
        """The context for a forward pass over the next `new` positions, with room for them.

        Args:
            limit: positions that will be needed at most; the memory grows towards it in steps that double.
        """
        self._reserve(self.length + new, limit)
        self.context.sequence_len_offset = self.length
        self.context.left_padding, self.context.rotary_length = self.padding, self.prompt_length
        if self.length and new == 1:
            self.context.enable_decode_mode()
        else:
            self.context.enable_prefill_mode()
        return self.context

    def _reserve(self, needed: int, limit: int) -> None:
        old = self.context
        if needed <= old.max_sequence_length:
            return
        capacity = max(needed, min(limit, max(2 * old.max_sequence_length, needed + _BLOCK // 2)))
        self.context = CacheContext(old.max_batch_size, -(-capacity // _BLOCK) * _BLOCK)
        self.context.states = old.states
        while old.key_value_memory_dict:  # layer by layer, so that only one layer is in memory twice
            layer, pair = old.key_value_memory_dict.popitem()
            self.context.key_value_memory_dict[layer] = tuple(self._grown(memory) for memory in pair)

    def _grown(self, memory: Tensor) -> Tensor:
        grown = memory.new_empty(self.context.max_sequence_length, *memory.shape[1:])
        grown[: self.length] = memory[: self.length]
        return grown

    def hidden(self, num_queries: int) -> Tensor | None:
        """Which positions the next queries must not see because they are padding: bool ``[rows, 1, queries, positions]``, True = hidden.

        A query on padding sees itself: a softmax over nothing would be NaN, and it would spread.
        """
        if self.padding is None:
            return None
        positions = torch.arange(self.length + num_queries, device=self.padding.device)
        hidden = (positions < self.padding[:, None])[:, None, None, :]
        return hidden & (positions[self.length :, None] != positions)

    def advance(self, ids: Tensor) -> None:
        """`ids` int64 ``[rows, new]`` have been computed."""
        self.length += ids.shape[1]
        self.context.states, self.context.next_states = self.context.next_states, {}
        if self.tokens is not None:
            self.tokens += ids[0].tolist()

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (positions in the present batch)."""
        index = torch.tensor(rows, dtype=torch.int64)
        memory = self.context.key_value_memory_dict
        self.context.max_batch_size = len(rows)
        for layer, pair in memory.items():
            memory[layer] = tuple(tensor[:, index.to(tensor.device)] for tensor in pair)
        for layer, state in self.context.states.items():
            self.context.states[layer] = tuple(tensor[index.to(tensor.device)] for tensor in state)
        if self.padding is not None:
            self.padding = self.padding[index.to(self.padding.device)]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
