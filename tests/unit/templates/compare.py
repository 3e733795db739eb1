"""Which named templates write what a folder of chat templates from elsewhere writes, over every conversation of the registry.

    python -m tests.unit.templates.compare FOLDER

A line for each ``.jinja`` of the folder with the named templates that render all conversations as it does (both with and without the beginning of
an answer), and whether the texts of the two are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from mswift.errors import DataError
from mswift.templates import Conversation
from mswift.templates.named import table
from mswift.templates.renderer import Renderer
from tests.unit.templates.registry import plain_conversations, tokenizer_for, tool_conversations


def asked(renderer: Renderer) -> Iterator[tuple[Conversation, bool]]:
    """What the template takes of the registry, whole and up to the last answer."""
    for conversation in (plain_conversations() | tool_conversations()).values():
        for prompt in (False, True):
            try:
                yield renderer.prepare(conversation.upto(len(conversation.messages) - prompt)), prompt
            except DataError:
                continue


def rendered(renderer: Renderer, conversation: Conversation, prompt: bool) -> str | None:
    try:
        return renderer.render(conversation, add_generation_prompt=prompt)
    except DataError:
        return None


def matches(text: str) -> Iterator[str]:
    """Named templates that write the same."""
    for name in table():
        tokenizer = tokenizer_for(name)
        mine, other = (Renderer.of(tokenizer, one, {}) for one in (tokenizer.chat_template, text))
        if all(rendered(mine, *case) == rendered(other, *case) for case in asked(mine)):
            yield f"{name} (same text)" if text == tokenizer.chat_template else name


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).rglob("*.jinja")):
        print(f"{path.stem}: {', '.join(matches(path.read_text(encoding='utf8'))) or 'none'}", flush=True)
