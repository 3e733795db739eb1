"""The text of ``mswift VERB --help``, made from the sections and wrapped to the terminal."""

from __future__ import annotations

import textwrap

from mswift.config.configs import Config
from mswift.config.fields import Flag

NARROWEST = 44  # the longest name with its placeholder
_NAME_COLUMN = 38


def flags_help(config_class: type[Config], width: int) -> str:
    """All flags of a command by section, with placeholders, choices and defaults; lines of at most `width` characters."""
    width = max(width, NARROWEST)
    parts = []
    for section, section_class in config_class.sections().items():
        flags = [flag for flag in config_class.flags().values() if flag.section == section]
        title = f"{section}: {(section_class.__doc__ or '').strip()}"
        parts.append("\n".join([*textwrap.wrap(title, width), *(line for flag in flags for line in _flag_lines(flag, width))]))
    return "\n\n".join(parts)


def _flag_lines(flag: Flag, width: int) -> list[str]:
    name = f"  --{flag.name} {flag.placeholder()}"
    text = f"{flag.help} [{flag.shown_default()}]"
    column = _NAME_COLUMN if width >= 2 * _NAME_COLUMN else 6
    indent = " " * column
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) < column:
        return [name + lines[0][len(name) :], *lines[1:]]
    return [*textwrap.wrap(name, width, subsequent_indent=" " * 6, break_on_hyphens=False, break_long_words=True), *lines]


def paragraphs(entries: dict[str, str], width: int, column: int = 26) -> str:
    """Names on the left, texts on the right, wrapped."""
    width = max(width, NARROWEST)
    column = min(column, width // 2)
    lines: list[str] = []
    for name, text in entries.items():
        wrapped = textwrap.wrap(text, width, initial_indent=" " * column, subsequent_indent=" " * column, break_on_hyphens=False)
        if len(name) + 3 > column:
            lines += [f"  {name}", *wrapped]
        else:
            lines += [f"  {name}".ljust(column) + wrapped[0][column:], *wrapped[1:]]
    return "\n".join(lines)
