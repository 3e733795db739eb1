"""Answers from a megatron model: prompts in, pieces of text out, with a key-value cache, over tensor- and pipeline-parallel ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.engines.megatron_model import MegatronModel
from mswift.errors import ConfigError, DataError
from mswift.rollout.cache import KeyValueCache
from mswift.rollout.sampling import next_tokens
from mswift.rollout.settings import GenerationSettings
from mswift.rollout.text import AnswerText


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer.

    Args:
        text: without what ended it. token_ids: every token that was drawn, the end token included.
        finish_reason: ``stop`` (end token or stop word) or ``length``. num_prompt_tokens: length of the prompt.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to the answer of prompt number `row`: text, perhaps none; with the last piece comes the whole `answer`."""

    row: int
    text: str
    answer: Answer | None = None


class Generator:
    """Answers prompts with a megatron model. Every rank of a replica calls it with the same arguments and gets the same answers.

    The cache outlives a call: where a single prompt begins as the conversation before it did, only the rest is computed. Rows of a batch are
    padded on the left, hidden from attention; rotary positions are relative, so this is exact.

    Args:
        model: with or without an adapter; its weights are not touched. tokenizer: of the checkpoint.
        max_length: prompt and answer in tokens; None: the model's own limit.

    Raises:
        ConfigError: the model was built with sequence parallelism (a step has one token, which cannot be split).
    """

    def __init__(self, model: MegatronModel, tokenizer: Any, *, max_length: int | None = None) -> None:
        layout = model.groups.layout
        if layout.ep > 1 and layout.tp > 1:
            raise ConfigError(
                f"generation from spread experts needs undivided layers, got {layout.describe()}; use expert or tensor parallelism alone"
            )
        if model.config.sequence_parallel:
            raise ConfigError("generation cannot split a sequence of one token over ranks; build the model with sequence_parallel false")
        self.model, self.tokenizer = model, tokenizer
        own = model.description.max_sequence_length
        self.max_length = min(own, max_length or own)
        self.cache = KeyValueCache(recurrent=model.description.has_recurrent_layers)

    def generate(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, *, seeds: Sequence[int] | None = None) -> list[Answer]:
        """The answers to `prompts` (token ids), in their order. See `stream`."""
        answers: dict[int, Answer] = {}
        for pieces in self.stream(prompts, settings, seeds=seeds):
            answers |= {piece.row: piece.answer for piece in pieces if piece.answer is not None}
        return [answers[row] for row in range(len(prompts))]

    def stream(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, *, seeds: Sequence[int] | None = None) -> Iterator[list[Piece]]:
        """Answer `prompts` (token ids) together, the same ones on all ranks of the model; a piece for every unfinished row after each token.

        The caller may stop between two steps by leaving the iterator.

        Args:
            seeds: one for each prompt; the answer of a row depends on nothing else that is random. None: different every time.

        Raises:
            DataError: a prompt is empty, or leaves no room for an answer.
        """
        self.check(prompts)
        with self._evaluating():
            yield from self._run(prompts, settings, seeds)

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise `DataError` if a prompt is empty or too long."""
        for prompt in prompts:
            if not prompt:
                raise DataError("the prompt has no tokens; give the model something to answer")
            if len(prompt) >= self.max_length:
                raise DataError(f"the prompt has {len(prompt)} tokens and the longest sequence is {self.max_length}; shorten it")

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No dropout inside; afterwards each chunk is as it was."""
        before = [chunk.training for chunk in self.model.chunks]
        for chunk in self.model.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk, training in zip(self.model.chunks, before, strict=True):
                chunk.train(training)

    def _run(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, seeds: Sequence[int] | None) -> Iterator[list[Piece]]:
        rows = [self._row(i, prompt, settings, None if seeds is None else seeds[i]) for i, prompt in enumerate(prompts)]
        ids, padding = _pad_left(prompts, self.model.runtime.device)
        limit = ids.shape[1] + max(row.room for row in rows)
        seen = self._seen(prompts) if settings.sampling.repetition_penalty != 1 else None
        if self._frequencies(ids.shape[1]) != self._frequencies(self.cache.prompt_length):
            self.cache.clear()  # its keys were rotated by others
        ids = ids[:, self.cache.begin(prompts, padding) :]
        while rows:
            tokens = self._step(ids, rows, settings, limit, seen)
            yield [row.take(token) for row, token in zip(rows, tokens.tolist(), strict=True)]
            alive = [i for i, row in enumerate(rows) if not row.finished]
            if alive and len(alive) < len(rows):
                self.cache.keep_rows(alive)
                tokens = tokens[alive]
                seen = None if seen is None else seen[alive]
            rows = [rows[i] for i in alive]
            ids = tokens[:, None]

    def _frequencies(self, length: int) -> list[int]:
        """Equal for two lengths of a prompt if both have the same rotary frequencies, which an answer keeps however long it gets."""
        return [rotation.variant(length) for rotation in self.model.description.attention.rotations]

    def _row(self, index: int, prompt: Sequence[int], settings: GenerationSettings, seed: int | None) -> _Row:
        room = min(settings.max_new_tokens, self.max_length - len(prompt))
        return _Row(index, len(prompt), room, AnswerText(self.tokenizer, settings.stop_words), frozenset(settings.stop_token_ids), seed)

    def _seen(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        seen = torch.zeros(len(prompts), self.model.description.vocab_size, dtype=torch.bool, device=self.model.runtime.device)
        for row, prompt in zip(seen, prompts):
            row[torch.tensor(prompt, device=seen.device)] = True
        return seen

    # no_grad rather than inference_mode: megatron-core keeps its rotary tables, and a table made in inference mode could not be trained with
    @torch.no_grad()
    def _step(self, ids: Tensor, rows: Sequence[_Row], settings: GenerationSettings, limit: int, seen: Tensor | None) -> Tensor:
        """Compute `ids` ``[rows, new]`` and choose the token that follows each row: int64 ``[rows]``, equal on all ranks."""
        logits = self._logits(ids, limit)
        groups = self.model.groups
        if logits is not None and groups.coords.tp == 0:
            tokens = next_tokens(logits, settings.sampling, [row.generator for row in rows], seen)
        else:
            tokens = ids.new_empty(len(rows))
        # One rank chooses for all: sums of probabilities need not be equal to the last bit on every device.
        if groups.is_last_stage and groups.layout.tp > 1:
            dist.broadcast(tokens, dist.get_global_rank(groups.tp, 0), group=groups.tp)
        if groups.layout.pp > 1:
            dist.broadcast(tokens, dist.get_global_rank(groups.pp, groups.layout.pp - 1), group=groups.pp)
        if groups.layout.independent_copies < groups.layout.dp:
            dist.broadcast(tokens, dist.get_global_rank(groups.dp, 0), group=groups.dp)
        if seen is not None:
            seen[torch.arange(len(rows), device=seen.device), tokens] = True
        return tokens

    def _logits(self, ids: Tensor, limit: int) -> Tensor | None:
        """fp32 ``[rows, vocab]`` after the last of `ids`, on the last pipeline stage; None on the others."""
        groups, chunks = self.model.groups, self.model.chunks
        num_stages, here = groups.layout.pp, groups.coords.pp
        rows, new = ids.shape
        context = self.cache.prepare(new, limit)
        hidden = self.cache.hidden(new)
        positions = torch.arange(self.cache.length, self.cache.length + new, device=ids.device).expand(rows, -1)
        output: Tensor | None = None
        for index in range(num_stages * len(chunks)):  # virtual stages go round the ranks
            if index % num_stages == here:
                chunk = chunks[index // num_stages]
                if output is not None:
                    chunk.set_input_tensor(output)
                output = chunk(ids, positions, hidden, inference_context=context, runtime_gather_output=True)
            output = self._pass_on(output, index, (new, rows, self.model.config.hidden_size))
        self.cache.advance(ids)
        return None if output is None else output[:, -1, : self.model.description.vocab_size].float()

    def _pass_on(self, output: Tensor | None, index: int, shape: tuple[int, int, int]) -> Tensor | None:
        """Send the hidden states of virtual stage `index` to the rank of the next one; what the next needs if it is here, else None."""
        groups, num_chunks = self.model.groups, len(self.model.chunks)
        num_stages, here = groups.layout.pp, groups.coords.pp
        source, target = index % num_stages, (index + 1) % num_stages
        if source == target or index + 1 == num_stages * num_chunks:
            return output
        if here == source:
            assert output is not None
            dist.send(output.contiguous(), dist.get_global_rank(groups.pp, target), group=groups.pp)
        if here != target:
            return None
        received = torch.empty(shape, dtype=self.model.dtype, device=self.model.runtime.device)
        dist.recv(received, dist.get_global_rank(groups.pp, source), group=groups.pp)
        return received


class _Row:
    """One prompt and what has been drawn for it."""

    def __init__(self, index: int, num_prompt_tokens: int, room: int, text: AnswerText, stop_token_ids: frozenset[int], seed: int | None) -> None:
        self.index, self.num_prompt_tokens, self.room = index, num_prompt_tokens, room
        self.text, self.stop_token_ids = text, stop_token_ids
        self.token_ids: list[int] = []
        self.finished = False
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def take(self, token: int) -> Piece:
        """The drawn token as a piece of the answer."""
        self.token_ids.append(token)
        ended = token in self.stop_token_ids
        text = "" if ended else self.text.add(token)
        self.finished = ended or self.text.stopped or len(self.token_ids) == self.room
        if not self.finished:
            return Piece(self.index, text)
        text += self.text.finish()
        reason: Literal["stop", "length"] = "stop" if ended or self.text.stopped else "length"
        return Piece(self.index, text, Answer(self.text.text, self.token_ids, reason, self.num_prompt_tokens))


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(ids int64 ``[rows, longest]``, number of padding positions int64 ``[rows]`` or None where there are none)."""
    longest = max(len(prompt) for prompt in prompts)
    missing = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * count + list(prompt) for count, prompt in zip(missing, prompts)], device=device)
    return ids, torch.tensor(missing, device=device) if any(missing) else None
