"""What is written beside the weights of an export, so that whoever loads it serves the chat that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mswift.config import ExportConfig, SftConfig
from mswift.config.saved import ARGS_FILE, to_save
from mswift.conversion.staging import TextFile

if TYPE_CHECKING:
    from mswift.engines.megatron_model import MegatronModel
    from mswift.templates import RowEncoder


def beside_training(config: SftConfig, directory: Path, encoder: RowEncoder) -> list[TextFile]:
    """Of a run: the template that its rows were rendered with, the tokens that end a turn, and the settings that ``mswift infer`` takes up again.

    Args:
        directory: the checkpoint.
    """
    from mswift.templates import ChatTemplate
    from mswift.templates.served import chat_files

    if not isinstance(encoder, ChatTemplate):
        return []
    return [*_text_files(chat_files(directory, encoder)), *_settings(config)]


def beside_export(config: ExportConfig, model: MegatronModel, adapter: Path | None) -> None:
    """Of an export: what the adapter brings along in place of the base's, and a template that was named.

    Raises:
        MswiftError: the tokenizer cannot be read, or does not have the tokens of the template.
    """
    from mswift.commands.session import make_template
    from mswift.templates.served import chat_files

    directory = model.settings.directory
    if adapter is not None and (adapter / "tokenizer.json").is_file() and (adapter / "tokenizer_config.json").is_file():
        model.tokenizer_directory = adapter
    texts = {}
    if config.template.template:
        texts = chat_files(directory, make_template(directory, config.model, config.template))
    model.beside = [*_text_files(texts), *_settings(config)]


def _text_files(texts: dict[str, str]) -> list[TextFile]:
    return [TextFile(name, text) for name, text in texts.items()]


def _settings(config: SftConfig | ExportConfig) -> list[TextFile]:
    known = to_save(config.to_flat())
    return [TextFile(ARGS_FILE, json.dumps(known, indent=2, ensure_ascii=False) + "\n")] if known else []
