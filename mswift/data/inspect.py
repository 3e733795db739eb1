"""Rows as the model sees them: the tokens of each, and how much every one of them counts, for the terminal, a page, or another program."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from mswift.data.encoding import to_conversation
from mswift.data.loading import ReadSettings, read_part
from mswift.data.pairs import SIDES, both
from mswift.data.registry import resolve
from mswift.data.rows import Recognised, Row
from mswift.errors import DataError
from mswift.templates import ChatTemplate, Encoded

_TRAINED = ((1.0, "bold green"), (0.0, "dim"))
_MORE, _LESS = "bold magenta", "cyan"


@dataclass(frozen=True, slots=True)
class Shown:
    """A training row to look at.

    Args:
        source, row: its place (the number of the line, from 1). part, parts: which of the training rows that were made of it.
        encoded: ids and weights. pieces: the text of every token; joined they are the text. note: what training would do with it, or "".
        side: ``chosen`` or ``rejected`` of a preference row, else "".
    """

    source: str
    row: int
    part: int
    parts: int
    encoded: Encoded
    pieces: tuple[str, ...]
    note: str = ""
    side: str = ""

    @property
    def title(self) -> str:
        """Such as ``a.jsonl:3, part 1 of 2: 57 tokens, 12 trained``, or ``a.jsonl:4, rejected: ...``."""
        trained = sum(weight > 0 for weight in self.encoded.weights[1:])
        part = f", part {self.part} of {self.parts}" if self.parts > 1 else ""
        side = f", {self.side}" if self.side else ""
        return f"{self.source}:{self.row}{side}{part}: {len(self.encoded)} tokens, {trained} trained{f' ({self.note})' if self.note else ''}"

    def runs(self) -> Iterator[tuple[float, list[int]]]:
        """Stretches of equal weight: the weight, and the positions of the tokens."""
        for weight, group in itertools.groupby(range(len(self.encoded)), key=self.encoded.weights.__getitem__):
            yield weight, list(group)


def first_rows(specs: Sequence[str], settings: ReadSettings, count: int) -> tuple[list[Row], list[str]]:
    """The first rows of every source, `count` together, and what was recognised of each in a line; no more than needed is read.

    A row that brings a rejected answer is read as a preference row whatever `settings` want.

    Raises:
        DataError: a source that cannot be read, too many bad rows before there were enough good ones, or no row at all.
    """
    settings = replace(settings, want="either")
    bad, rows, lines, num_read = settings.bad_rows(), list[Row](), list[str](), 0
    for number, text in enumerate(specs):
        spec, parts = resolve(text, use_hf=settings.use_hf)
        recognised, before = Recognised(), len(bad.errors)
        wanted = -(-(count - len(rows)) // (len(specs) - number))
        found = (row for part in parts for row in read_part(part, settings, bad, recognised))
        taken = list(itertools.islice(found, wanted if spec.count is None else min(wanted, spec.count)))
        num_read += recognised.num_read
        if taken:
            lines.append(f"the first of {recognised.line(spec.name, bad=len(bad.errors) - before)}")
        rows += taken
    bad.finish(num_read)
    if not rows:
        raise DataError(f"{', '.join(specs)}: holds no rows; check --dataset")
    return rows, lines


def inspect_rows(rows: Sequence[Row], template: ChatTemplate, max_length: int | None = None) -> list[Shown | DataError]:
    """What becomes of each row, or why it is refused, in order.

    Args:
        max_length: of a sequence; a longer row is shown whole, with a note.
    """
    asked = [both(row) if row.rejected is not None else (to_conversation(row),) for row in rows]
    made = iter(template.encode_batch(list(itertools.chain.from_iterable(asked))))
    return [
        one for row, sides in zip(rows, asked, strict=True) for one in _shown(row, list(itertools.islice(made, len(sides))), template, max_length)
    ]


def _shown(row: Row, made: list[list[Encoded] | DataError], template: ChatTemplate, max_length: int | None) -> list[Shown | DataError]:
    """The training rows of a row; of a preference row those of both sides, or why one of them is refused."""
    names = SIDES if len(made) == 2 else ("",)
    shown: list[Shown | DataError] = []
    for side, parts in zip(names, made, strict=True):
        if isinstance(parts, DataError):
            return [DataError(f"{row.where}: {f'the {side} answer: ' if side else ''}{parts}")]
        for part, encoded in enumerate(parts, start=1):
            if not side or part == len(parts):  # of a preference row the last one is trained
                note = f"longer than {max_length}" if max_length is not None and len(encoded) > max_length else ""
                pieces = split_text(template, encoded.input_ids)
                shown.append(Shown(row.source, row.line, part, len(parts), encoded, pieces, note, side))
    return shown


def split_text(template: ChatTemplate, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of every token; a character of several tokens belongs to the last of them."""
    pieces: list[str] = []
    before = begin = 0  # a piece is decoded together with the one before it, since a tokenizer may join words by their neighbours
    known = ""
    for end in range(1, len(ids) + 1):
        both = template.decode(ids[before:end])
        if both.endswith("\ufffd") and end < len(ids) and end - begin < 8:
            pieces.append("")
            continue
        pieces.append(both[len(known) :])
        before, begin, known = begin, end, template.decode(ids[begin:end])
    return tuple(pieces)


def to_json(shown: Shown) -> str:
    """One line: ``source``, ``row``, ``input_ids``, ``weights``, ``text``; of a preference row also ``side``."""
    encoded, side = shown.encoded, {"side": shown.side} if shown.side else {}
    values = {"input_ids": encoded.input_ids, "weights": encoded.weights, "text": "".join(shown.pieces)}
    return json.dumps({"source": shown.source, "row": shown.row, **side, **values}, ensure_ascii=False)


def to_terminal(shown: Shown) -> Text:
    """Trained tokens in colour, the others dim; a weight that is neither 0 nor 1 is written before its stretch."""
    text = Text()
    text.append(f"{shown.title}\n", style="bold")
    for weight, positions in shown.runs():
        style = dict(_TRAINED).get(weight, _MORE if weight > 1 else _LESS)
        if weight not in (0.0, 1.0):
            text.append(f"[x{weight:g}]", style="reverse")
        text.append("".join(shown.pieces[i] for i in positions), style=style)
    return text


def legend() -> Text:
    """What the colours of `to_terminal` mean."""
    text = Text()
    text.append("trained", style="bold green")
    text.append("  not trained", style="dim")
    text.append("  [x2] counts more", style=_MORE)
    text.append("  [x0.5] counts less", style=_LESS)
    return text


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --card: #f5f5f7; --rule: #d9d9de; --quiet: #6e6e76; --on: #0a6b2d;
  --on-back: #d3f3dd;
  --more-back: #efd9fb; --less-back: #d8ecfa; --bad: #a3231c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #161618; --ink: #f0f0f2; --card: #212124; --rule: #3a3a40; --quiet: #9c9ca6; --on: #8ce0a6;
  --on-back: #173c24; --more-back: #40244f; --less-back: #1c3a4d; --bad: #ff8d85; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; background: var(--back); color: var(--ink); }}
h1 {{ font-size: 1.3rem; margin: 0 0 .2rem; }} p {{ color: var(--quiet); margin: .2rem 0 1.2rem; }}
section {{ background: var(--card); border: 1px solid var(--rule); border-radius: 8px; margin: 0 0 1rem; padding: .8rem 1rem; }}
h2 {{ font-size: .95rem; margin: 0 0 .5rem; }} .bad {{ color: var(--bad); }}
pre {{ font: 13px/1.65 ui-monospace, monospace; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--quiet); }}
pre i {{ font-style: normal; border-radius: 2px; }} pre i:hover {{ outline: 1px solid currentColor; }} pre i:nth-child(even) {{ opacity: .86; }}
.t {{ background: var(--on-back); color: var(--on); }} .m {{ background: var(--more-back); color: var(--ink); }}
.l {{ background: var(--less-back); color: var(--ink); }}
</style></head><body>
<h1>{title}</h1>
<p><span class="t">trained</span> &nbsp; not trained &nbsp; <span class="m">counts more than 1</span> &nbsp; <span class="l">counts less than 1</span>
&nbsp; (point at a token for its id and weight)</p>
{rows}
</body></html>
"""


def to_html(shown: Sequence[Shown | DataError], title: str) -> str:
    """A page of its own: every token marked by whether it is trained, its id and weight on hover."""
    rows = []
    for one in shown:
        if isinstance(one, DataError):
            rows.append(f'<section><h2 class="bad">{html.escape(str(one))}</h2></section>')
            continue
        tokens = "".join(map(_token, one.encoded.input_ids, one.encoded.weights, one.pieces))
        rows.append(f"<section><h2>{html.escape(one.title)}</h2><pre>{tokens}</pre></section>")
    return _PAGE.format(title=html.escape(title), rows="\n".join(rows))


def _token(token_id: int, weight: float, piece: str) -> str:
    kind = "" if weight == 0 else "t" if weight == 1 else "m" if weight > 1 else "l"
    shown = html.escape(piece).replace("\n", "\u21b5\n") if piece else ""
    return f'<i{f" class={kind}" if kind else ""} title="id {token_id}, weight {weight:g}">{shown}</i>'
