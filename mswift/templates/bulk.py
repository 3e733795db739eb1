"""Weights of many rows of known forms at once, from their ids alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mswift.errors import DataError
from mswift.templates.conversation import Encoded, EncodedChunk
from mswift.templates.forms import Form

Bools: TypeAlias = npt.NDArray[np.bool_]
Integers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows end to end: int32 ids, float32 weights, and the length of each."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    lengths: Integers


def flatten(rows: Sequence[Encoded]) -> Rows:
    """Rows end to end."""
    ids, weights = array("i"), array("f")  # they take a list several times faster than numpy does
    for row in rows:
        ids.fromlist(row.input_ids)
        weights.fromlist(row.weights)
    return Rows(np.asarray(ids), np.asarray(weights), np.asarray([len(row.input_ids) for row in rows], np.int64))


def weigh_rows(all_ids: Iterable[list[int]], forms: Sequence[Form], is_added: Bools) -> tuple[Rows, Bools]:
    """Rows with weights, and for each whether its form holds: the added tokens are those of the form, and each prompt is tokenised as in serving.

    Args:
        all_ids: of each row, without those of its form's head; one list is held at a time. is_added: for every id, whether it is an added token.
    """
    flat = array("i")
    lengths = np.empty(len(forms), np.int64)
    for row, (form, ids) in enumerate(zip(forms, all_ids, strict=True)):
        flat.fromlist(form.head)
        flat.fromlist(ids)
        lengths[row] = len(form.head) + len(ids)
    tokens = np.asarray(flat)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    places = np.flatnonzero(is_added[tokens])
    firsts = np.searchsorted(places, bounds)
    holds = np.zeros(len(forms), np.bool_)
    steps = np.zeros(len(tokens) + 1, np.int8)
    groups: dict[int, list[int]] = {}
    for row, form in enumerate(forms):
        groups.setdefault(id(form), []).append(row)
    for members in groups.values():
        _weigh_form(forms[members[0]], np.asarray(members), tokens, places, firsts, holds, steps)
    return Rows(tokens, np.cumsum(steps[:-1], dtype=np.int8).astype(np.float32), lengths), holds


def _weigh_form(
    form: Form, rows: Integers, tokens: npt.NDArray[np.int32], places: Integers, firsts: Integers, holds: Bools, steps: npt.NDArray[np.int8]
) -> None:
    """Marks in `steps` where weights begin and end in the rows of one form, and in `holds` the rows for which it holds."""
    count = len(form.added)
    rows = rows[firsts[rows + 1] - firsts[rows] == count]
    at = places[firsts[rows][:, None] + np.arange(count)]  # [rows, added tokens]
    good = (tokens[at] == np.asarray(form.added, np.int32)).all(axis=1)
    for span in form.spans:
        width = len(span.prompt)
        good &= at[:, span.anchor] + width <= at[:, span.end]
        inside = np.minimum(at[:, span.anchor, None] + np.arange(width), len(tokens) - 1)
        good &= (tokens[inside] == np.asarray(span.prompt, np.int32)).all(axis=1)
    holds[rows] = good
    for span in form.spans:
        steps[at[good, span.anchor] + len(span.prompt)] += 1
        steps[at[good, span.end] + 1] -= 1


def chunk_of(results: Sequence[list[Encoded] | DataError]) -> EncodedChunk:
    """What became of conversations, as arrays."""
    nothing = Rows(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    return assemble(nothing, np.zeros(0, np.bool_), [], dict(enumerate(results)))


def assemble(quick: Rows, holds: Bools, quick_of: Sequence[int], slow: dict[int, list[Encoded] | DataError]) -> EncodedChunk:
    """A chunk in the order of its conversations.

    Args:
        quick_of: the conversation of each quick row; those for which `holds` is false are among the slow ones. slow: the others by their number.
    """
    if not slow:
        return EncodedChunk(quick.ids, quick.weights, quick.lengths, np.asarray(quick_of, np.int64), {})
    refused = {number: str(made) for number, made in sorted(slow.items()) if isinstance(made, DataError)}
    made = sorted((number, row) for number, rows in slow.items() if not isinstance(rows, DataError) for row in range(len(rows)))
    other = flatten([slow[number][row] for number, row in made])  # type: ignore[index]
    origins = np.concatenate([np.asarray(quick_of, np.int64), np.asarray([number for number, _ in made], np.int64)])
    lengths = np.concatenate([quick.lengths, other.lengths])
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(origins, kind="stable")
    order = order[np.concatenate([holds, np.ones(len(made), np.bool_)])[order]]
    taken = np.repeat(starts[order] - (np.cumsum(lengths[order]) - lengths[order]), lengths[order])
    taken += np.arange(len(taken))
    ids, weights = (np.concatenate(pair)[taken] for pair in ((quick.ids, other.ids), (quick.weights, other.weights)))
    return EncodedChunk(ids, weights, lengths[order], origins[order], refused)
