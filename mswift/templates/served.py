"""What is written beside trained weights, so that other programs serve the chat that was trained: its template, and the tokens that end a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mswift.config.json_object import read_json_object
from mswift.errors import ModelError
from mswift.templates.chat import ChatTemplate

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_GENERATION_CONFIG = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_EOS = re.compile(r"\beos_token\b")


def chat_files(directory: Path, template: ChatTemplate) -> dict[str, str]:
    """The files of a checkpoint that have to say something else once it has been trained with a template: name -> text.

    A template that is not the checkpoint's own goes into ``chat_template.jinja`` and, for older readers, into ``tokenizer_config.json``; the token
    that ends its turns becomes the tokenizer's ``eos_token``, unless the template itself writes that one. ``generation_config.json`` gets every
    token that ends a turn, also where the checkpoint's own template has one that it did not stop at.

    Args:
        directory: the checkpoint, or a folder with its small files.

    Raises:
        ModelError: one of its small files holds no JSON object.
    """
    files = {}
    if template.template_text != read_own_template(directory):
        files = {TEMPLATE_FILE: template.template_text} | _tokenizer_files(directory, template)
    generation = _read(directory / _GENERATION_CONFIG)
    known = generation or {name: value for name, value in _read(directory / "config.json").items() if name in _IDS and value is not None}
    stops = _stops(template)
    if not set(stops) <= set(_as_list(known.get("eos_token_id"))):
        files[_GENERATION_CONFIG] = _json({**known, "eos_token_id": stops + [i for i in _as_list(known.get("eos_token_id")) if i not in stops]})
    return files


def read_own_template(directory: Path) -> str | None:
    """The chat template that a folder of a tokenizer has; None where it has none, or several by name."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf8")
    own = _read(directory / TOKENIZER_CONFIG).get("chat_template")
    return own if isinstance(own, str) else None


def _tokenizer_files(directory: Path, template: ChatTemplate) -> dict[str, str]:
    config, special = _read(directory / TOKENIZER_CONFIG), _read(directory / _SPECIAL_TOKENS)
    end = template.end_token
    ends_with_eos = end is None or end == template.tokenizer.eos_token or _EOS.search(template.template_text)
    changed = {} if ends_with_eos else {"eos_token": end}
    files = {TOKENIZER_CONFIG: _json(_with(config, {**changed, "chat_template": template.template_text}))} if config or changed else {}
    return files | ({_SPECIAL_TOKENS: _json(_with(special, changed))} if special and changed else {})


def _with(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes of a token keep what else the file says of it."""
    kept = {name: {**content[name], "content": value} if isinstance(content.get(name), dict) else value for name, value in changes.items()}
    return {**content, **kept}


def _stops(template: ChatTemplate) -> list[int]:
    """The end of a turn first, then the others in order."""
    end = template.end_token
    first = None if end is None else template.tokenizer.convert_tokens_to_ids(end)
    return sorted(template.stop_token_ids, key=lambda token: (token != first, token))


def _as_list(value: Any) -> Sequence[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, ModelError, "mend it, or download it again") if path.is_file() else {}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
