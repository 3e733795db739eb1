"""Settings that an adapter or a model brings along: args.json of the run that wrote it, or the base model that a PEFT adapter names.

What is taken: which model and how (for an adapter), and the template. Never the permission to run foreign code, and no token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mswift.config.aliases import RENAMED, VALUES
from mswift.config.configs import TOLD_BESIDE, Config
from mswift.config.json_object import read_json_object
from mswift.errors import ConfigError

ARGS_FILE = "args.json"
_WITH_ADAPTER = ("model", "model_revision", "torch_dtype", "use_hf")


def apply_saved(config_class: type[Config], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`given` completed by what was saved beside the adapter or the model, and a note for the user.

    Args:
        given: flags that are set; they win. Nothing is added where the command has no ``load_args``, or it is false.

    Raises:
        ConfigError: the file that was found cannot be read, or holds a value of the wrong type.
    """
    values = dict(given)
    flags = config_class.flags()
    if "load_args" not in flags or not values.get("load_args", flags["load_args"].default):
        return values, []
    adapters = values.get("adapters") or []
    folder = Path(adapters[0] if adapters else values.get("model", "")).expanduser()
    if not (adapters or values.get("model")) or not folder.is_dir():
        return values, []
    source, saved = _read_args(folder)
    if source is None and adapters:
        source, saved = _read_base_model(folder)
    names = (*_WITH_ADAPTER, *TOLD_BESIDE) if adapters else TOLD_BESIDE
    taken = {name: saved[name] for name in names if name in flags and name not in values and saved.get(name) not in (None, "")}
    for name, raw in taken.items():
        synonyms = VALUES.get(name, {})
        values[name] = flags[name].read(synonyms.get(raw, raw) if isinstance(raw, str) else raw, f"{source}: {name}")
    note = ", ".join(f"{name} {value if len(str(value)) <= 60 else '...'}" for name, value in taken.items())
    return values, [f"from {source}: {note}"] if taken else []


def to_save(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a run those that `apply_saved` takes, for the args.json of an export; empty where none is about the template."""
    names = (*_WITH_ADAPTER, *TOLD_BESIDE)
    given = {name: flat[name] for name in names if flat.get(name) not in (None, "")}
    return given if set(given) & set(TOLD_BESIDE) else {}


def _read_args(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """args.json of a run folder, or of one of its checkpoints, under today's names."""
    places = [folder, folder.parent] if re.fullmatch(r"checkpoint-\d+(-merged)?", folder.name) else [folder]
    for path in (place / ARGS_FILE for place in places):
        if path.is_file():
            content = _read_json(path)
            if "sft_type" in content or "template_backend" in content:
                content.pop("template", None)  # ms-swift's own: there it always has a name, also where it is the checkpoint's
            return path, {RENAMED[name]: value for name, value in content.items() if name in RENAMED} | content
    return None, {}


def _read_base_model(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None, {}
    return path, {"model": _read_json(path).get("base_model_name_or_path")}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, ConfigError, "mend it, or give --load_args false")
