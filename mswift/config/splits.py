"""Which layers each pipeline stage holds, as a value: even, by the counts of the first and the last stage, or by megatron-core's layout string."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mswift.errors import ConfigError

EMBEDDING, LAYER, FURTHER, LOSS = "E", "t", "m", "L"
"""The letters of a layout string: the embedding, a layer, a layer that predicts tokens further ahead (MTP), head and loss."""
_LONGEST = 100_000
_FLAG = "--pipeline_model_parallel_layout"


def parse_stages(text: str) -> tuple[str, ...]:
    """The letters of every (virtual) stage of a layout string, in the order of the layers: ``Et*2|(tt|)*2L`` is ``Ett, tt, tt, L``.

    The syntax is megatron-core's: ``|`` between stages, ``x*3`` or ``(...)*3`` for a repetition, commas for the eye.

    Raises:
        ConfigError: another letter, a repetition that is none, or an order in which no model can run.
    """

    def repeat(match: re.Match[str]) -> str:
        if len(match[2]) > 5 or len(match[1]) * int(match[2]) > _LONGEST:
            raise ConfigError(f"{_FLAG}: got {match[0]!r}, wanted a repetition of at most {_LONGEST} letters; make it smaller")
        return match[1] * int(match[2])

    letters = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        letters = re.sub(pattern, repeat, letters)
    unknown = sorted(set(letters) - {EMBEDDING, LAYER, FURTHER, LOSS, "|"})
    if unknown:
        raise ConfigError(f"{_FLAG}: got {text!r} with {unknown[0]!r}, wanted E, t, m, L and | with *N behind a letter or (...), as in Et*3|t*4|t*3L")
    stages = tuple(letters.split("|"))
    flat = "".join(stages)
    if not re.fullmatch(f"{EMBEDDING}{LAYER}*{FURTHER}*{LOSS}", flat):
        raise ConfigError(f"{_FLAG}: got {text!r}, wanted one E (the embedding) first, then layers t, then layers m, one L (the loss) last")
    if FURTHER in flat and flat.count(FURTHER) != stages[-1].count(FURTHER):
        raise ConfigError(f"{_FLAG}: got {text!r}, wanted every m in the last stage, with the L; the output head that they share is there")
    return stages


@dataclass(frozen=True, slots=True)
class PipelineSplit:
    """How layers are divided into stages; without any argument evenly.

    Args:
        first, last: layers of the first and of the last pipeline rank, over its virtual stages; the other ranks share the rest evenly.
        count_embedding, count_loss: the embedding, the loss take the place of a layer in the first, the last stage.
        text: a layout string, which says all by itself.
    """

    first: int | None = None
    last: int | None = None
    count_embedding: bool = False
    count_loss: bool = False
    text: str | None = None

    @property
    def is_even(self) -> bool:
        return self == EVEN

    def faults(self, num_layers: int, pp: int, vpp: int, further: int = 0) -> Iterator[str]:
        """One text with every factor for each reason why this split does not divide a model.

        Args:
            further: layers that predict tokens further ahead, of this run.
        """
        sizes = f"pp({pp}) x vpp({vpp}) = {pp * vpp}"
        if self.text is not None:
            for name, wanted, letter in (("layers", num_layers, LAYER), ("mtp_num_layers", further, FURTHER)):
                count = sum(stage.count(letter) for stage in parse_stages(self.text))
                if count != wanted:
                    yield f"{wanted} {name} by the {count} {letter} of {_FLAG} {self.text}"
        elif self.first is None and self.last is None:
            counted = [name for name, there in (("the embedding", self.count_embedding), ("the loss", self.count_loss)) if there]
            if (num_layers + len(counted)) % (pp * vpp) or num_layers + len(counted) < pp * vpp:
                yield f"{' and '.join([f'{num_layers} layers', *counted])} by {sizes}"
        else:
            ends = [(name, count) for name, count in (("first", self.first), ("last", self.last)) if count is not None]
            rest, others = num_layers - sum(count for _, count in ends), pp - len(ends)
            left = " - ".join([f"{num_layers} layers", *(f"{name}({count})" for name, count in ends)])
            if rest < 0 or (rest and not others) or (others and (rest % (others * vpp) or not rest)):
                yield f"{left} = {rest} by {others} other stage(s) of pp({pp}) x vpp({vpp}) = {others * vpp}"
            yield from (f"{name}({count}) layers by vpp({vpp})" for name, count in ends if count % vpp)

    def counts(self, num_layers: int, pp: int, vpp: int) -> tuple[int, ...]:
        """Layers of every virtual stage in the order of the layers (rank 0 to pp - 1, then again), of a model without `faults`."""
        if self.text is not None:
            return tuple(stage.count(LAYER) for stage in parse_stages(self.text))
        if self.first is None and self.last is None:
            each = (num_layers + self.count_embedding + self.count_loss) // (pp * vpp)
            return (each - self.count_embedding, *[each] * (pp * vpp - 2), each - self.count_loss) if pp * vpp > 1 else (num_layers,)
        ends = [count for count in (self.first, self.last) if count is not None]
        middle = (num_layers - sum(ends)) // max(pp - len(ends), 1)
        by_rank = [middle] * pp
        by_rank[0] = middle if self.first is None else self.first
        by_rank[-1] = middle if self.last is None else self.last
        return tuple(count // vpp for count in by_rank) * vpp

    def describe(self) -> str:
        """A short text, such as ``first 3``; empty where the split is even."""
        if self.text is not None:
            return self.text
        parts = [f"{name} {count}" for name, count in (("first", self.first), ("last", self.last)) if count is not None]
        parts += [f"{name} counted" for name, there in (("embedding", self.count_embedding), ("loss", self.count_loss)) if there]
        return ", ".join(parts)


EVEN = PipelineSplit()
