"""What ``quantization_config`` of a config.json says, read without torch: a way to quantise that is not read here is told at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mswift.errors import ModelError

QUANTIZATION_KEY = "quantization_config"
METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4")
_DTYPES = ("bfloat16", "float16", "float32")
_EXCLUDED = ("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "ignore")
"""Under which names the methods list the modules that they left alone."""


def quantisation_of(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The quantisation settings of a config.json; None: its weights are plain.

    Raises:
        ModelError: a method that is not read here.
    """
    settings = config.get(QUANTIZATION_KEY)
    if settings is None:
        return None
    if isinstance(settings, dict) and settings.get("load_in_4bit"):  # earlier versions of bitsandbytes did not name themselves
        settings = {"quant_method": "bitsandbytes", **settings}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method not in METHODS:
        raise ModelError(f"{where}: weights quantised by {method!r} are not read; wanted one of {', '.join(METHODS)}, or plain weights")
    return dict(settings)


def dtype_of(config: Mapping[str, Any], where: str) -> str:
    """Name of the dtype that quantised weights take: the config's own, bfloat16 where it has none.

    Raises:
        ModelError: it is another.
    """
    name = str(config.get("dtype") or config.get("torch_dtype") or _DTYPES[0]).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"{where}: dtype {name} of a quantised checkpoint, wanted {' or '.join(_DTYPES)}; mend its config.json")
    return name


def refuse(settings: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Refuse a setting that changes what the stored numbers mean; an absent one is None.

    Raises:
        ModelError: a value that is not among those allowed.
    """
    for name, values in allowed.items():
        if settings.get(name) not in values:
            wanted = " or ".join(str(value) for value in values if value is not None)
            raise ModelError(
                f"{where}: {settings.get('quant_method')} weights with {name} = {settings.get(name)!r} are not read, wanted {wanted}; "
                "take a checkpoint with such weights, or a plain one"
            )


def excluded_modules(settings: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Those of some modules that the settings say were not quantised.

    A name counts from the start of a module's up to a dot, or as its end; it is a regular expression too (transformers' reading). Of
    compressed-tensors it is the whole name, or ``re:`` and a regular expression from its start.
    """
    lists = [settings.get(key) for key in _EXCLUDED]
    names = [name for entry in lists if isinstance(entry, list) for name in entry if name and isinstance(name, str)]
    matches = matches_target if settings.get("quant_method") == "compressed-tensors" else _matches_pattern
    return [module for module in modules if any(matches(module, name) for name in names)]


def matches_target(module: str, target: str) -> bool:
    """Whether a target of compressed-tensors means a module by its name; classes, such as ``Linear``, are not looked at."""
    return bool(re.match(target[3:], module)) if target.startswith("re:") else module == target


def _matches_pattern(module: str, pattern: str) -> bool:
    try:
        return module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        return False
