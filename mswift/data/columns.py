"""Which column means what: the names that people give, mapped to the names that mswift reads, by ms-swift's table.

Names are compared without regard to case. A name that mswift reads wins over one that is mapped to it; of several that are mapped to the same
name the first of the table wins, and the others stay as columns of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONVERSATION = {
    "messages": ("conversations", "conversation"),
    "images": ("image",),
    "videos": ("video",),
    "audios": ("audio",),
    "system": ("system_prompt",),
}
QUESTION = ("prompt", "input", "instruction", "question", "problem")
ANSWER = ("answer", "output", "targets", "target", "answer_key", "answers", "solution", "text", "completion", "content")
KEPT = ("solution",)
"""Names that stay as columns even where they were mapped: reward functions read them."""


def rename(data: Mapping[str, Any], wanted: Mapping[str, str]) -> tuple[dict[str, Any], set[str]]:
    """The row under the names of ``--columns``, and which of these the row had. An exact name wins over one of another case."""
    lower = {str(name).lower(): name for name in data}
    found = {old: old if old in data else lower[old.lower()] for old in wanted if old in data or old.lower() in lower}
    targets = {found[old]: wanted[old] for old in found}
    taken = set(targets.values())
    kept = {name: value for name, value in data.items() if name not in targets and name not in taken}
    return {**kept, **{new: data[old] for old, new in targets.items()}}, set(found)


def map_conversation(data: dict[str, Any]) -> dict[str, str]:
    """Renames, in place, what a row of any shape may have. Returns old name -> new name."""
    return _map(data, CONVERSATION)


def map_question(data: dict[str, Any], *, keep_answer: bool) -> dict[str, str]:
    """Renames, in place, to ``query`` and ``response``.

    Args:
        keep_answer: the answer stays under its own name as well, for reward functions.
    """
    before = dict(data)
    mapped = _map(data, {"query": QUESTION, "response": ANSWER})
    for old, new in mapped.items():
        if old.lower() in KEPT or (keep_answer and new == "response"):
            data[old] = before[old]
    return mapped


def _map(data: dict[str, Any], table: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    lower = {str(name).lower(): name for name in reversed(data)}
    mapped: dict[str, str] = {}
    for new, olds in table.items():
        if data.get(new) is not None:
            continue
        old = next((lower[name] for name in (new, *olds) if name in lower and data.get(lower[name]) is not None), None)
        if old is not None and old != new:
            data[new] = data.pop(old)
            mapped[old] = new
    return mapped
