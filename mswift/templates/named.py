"""Chat templates by name (``--template``): for base models that have none, and where another than the model's own is wanted.

Each is a Jinja file in ``jinja/`` and a line of ``jinja/templates.json``: for which models it was made, the tokens that it needs, texts that end
an answer beside its own end, and other names.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mswift.config.fields import nearest
from mswift.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FOLDER = Path(__file__).with_name("jinja")
_EOS = "eos_token"


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A template that ships with mswift.

    Args:
        models: for which it was made. tokens: what the tokenizer has to have as one token each (``eos_token``: any end of text).
        stop_words: texts that end an answer. aliases: other names.
    """

    name: str
    models: str
    tokens: tuple[str, ...]
    stop_words: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The Jinja text."""
        return (_FOLDER / f"{self.name}.jinja").read_text(encoding="utf8")

    def check(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Refuses a tokenizer that would write one of the tokens in pieces.

        Raises:
            DataError: with the tokens, and templates that need none.
        """
        vocabulary = tokenizer.get_vocab()
        lacking = [token for token in self.tokens if token != _EOS and token not in vocabulary]
        if _EOS in self.tokens and tokenizer.eos_token is None:
            lacking.append("an eos_token")
        if lacking:
            fitting = [other.name for other in table().values() if set(other.tokens) <= {_EOS}]
            raise DataError(
                f"--template {self.name} needs {', '.join(lacking)}, which the tokenizer of {tokenizer.name_or_path or 'the model'} does not have; "
                f"add them to the model, or take a template without such tokens ({', '.join(fitting)})"
            )


@functools.cache
def table() -> dict[str, NamedTemplate]:
    """Name -> template, sorted by name; without the other names."""
    entries: dict[str, dict[str, Any]] = json.loads((_FOLDER / "templates.json").read_text(encoding="utf8"))
    return {
        name: NamedTemplate(name, entry["models"], tuple(entry["tokens"]), tuple(entry.get("stop_words", ())), tuple(entry.get("aliases", ())))
        for name, entry in entries.items()
    }


def find_template(name: str) -> NamedTemplate:
    """The template that a name means; ``-`` and ``.`` are ``_``, capitals do not matter.

    Raises:
        ConfigError: there is none, with the nearest name.
    """
    names = {alias: template for template in table().values() for alias in (template.name, *template.aliases)}
    plain = name.strip().lower().replace("-", "_").replace(".", "_")
    found = names.get(plain)
    if found is None:
        near = nearest(plain, list(names))
        hint = f"did you mean {near}?" if near else f"wanted one of {', '.join(table())}"
        raise ConfigError(f"--template {name} is unknown; {hint} (without the flag the checkpoint's own is used)")
    return found
