"""A PEFT adapter directory: ``adapter_model.safetensors`` and ``adapter_config.json``, as ``peft`` itself writes and reads them."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mswift.conversion.adapters import adapted_modules
from mswift.conversion.directories import ADAPTER_CONFIG_FILE, ADAPTER_FILE, read_adapter_config
from mswift.conversion.safetensors_io import SafetensorsFile, TensorSpec, save_file
from mswift.conversion.staging import staged
from mswift.errors import ConversionError, ModelError

WEIGHTS_FILE, CONFIG_FILE = ADAPTER_FILE, ADAPTER_CONFIG_FILE

# Settings of LoraConfig that say nothing about what a finished adapter computes; any other that is set is refused.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type"),
}
_UNDERSTOOD = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights on loading


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as read: A [r, in] and B [out, r] by PEFT name; every module has the one ``scale``."""

    tensors: dict[str, torch.Tensor]
    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    base_model: str | None
    target_modules: str | tuple[str, ...]

    @property
    def scale(self) -> float:
        """What ``B @ A`` is multiplied by; stays the same when stacking raises the rank."""
        return lora_scale(self.alpha, self.rank, self.use_rslora)

    @property
    def modules(self) -> set[str]:
        """HF names of the adapted modules."""
        return adapted_modules(self.tensors)


def lora_scale(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski, 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def write_peft(
    directory: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    base_model: str | None,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Iterable[str] | None = None,
    use_rslora: bool = False,
    extra_files: Iterable[str | Path] = (),
    exist_ok: bool = False,
) -> Path:
    """Write an adapter directory that `peft` and vLLM load; it appears whole or not at all. One process.

    Modules of different rank (stacked adapters) are brought to the largest by zeros, and alpha raised to keep the scale, rather than
    written with ``rank_pattern``, which not every reader heeds.

    Args:
        tensors: by PEFT name, from `lora_to_peft`. base_model: id or path of the base, or None. rank, alpha, use_rslora: give the scale.
        target_modules: None: the last name part of every adapted module. extra_files: copied by name.

    Raises:
        ConversionError: no tensors, names that are not those of an adapter, or the directory cannot be written.
    """
    modules = adapted_modules(tensors)
    if not modules:
        raise ConversionError(f"no adapter to write to {directory}: no layer has one; check target_modules")
    width = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight"))
    scale = lora_scale(alpha, rank, use_rslora)
    written_alpha = alpha if width == rank else scale * (math.sqrt(width) if use_rslora else width)
    names = sorted(target_modules) if target_modules is not None else sorted({module.rsplit(".", 1)[-1] for module in modules})
    config = _config(base_model, width, written_alpha, dropout, names, use_rslora)
    padded = {name: _pad(name, tensor, width) for name, tensor in sorted(tensors.items())}
    nbytes = sum(TensorSpec(tensor.dtype, tuple(tensor.shape)).nbytes for tensor in padded.values())
    with staged(Path(directory), exist_ok, nbytes) as temporary:
        save_file(temporary / WEIGHTS_FILE, padded)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for path in extra_files:
            shutil.copyfile(path, temporary / Path(path).name)
    return Path(directory)


def _pad(name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    dim = 0 if name.endswith("lora_A.weight") else 1
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = (missing, tensor.shape[1]) if dim == 0 else (tensor.shape[0], missing)
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _config(base_model: str | None, rank: int, alpha: float, dropout: float, target_modules: list[str], use_rslora: bool) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": use_rslora,
    }


def read_peft(directory: str | Path) -> PeftAdapter:
    """Read an adapter directory; the adapters are small, so all tensors come at once.

    Where ``rank_pattern`` or ``alpha_pattern`` give modules a scale of their own, their B takes the difference up, so that one scale holds.

    Raises:
        ModelError: not an adapter directory, or its files are damaged.
        ConversionError: an adapter of a kind that has no counterpart here (DoRA, biases, whole modules saved, ...).
    """
    path = Path(directory)
    config = read_adapter_config(path)
    _refuse_unsupported(path, config)
    file = SafetensorsFile(path / WEIGHTS_FILE)
    tensors = {}
    for name, spec in file.specs.items():
        tensors[name] = torch.empty(spec.shape, dtype=spec.dtype)
        file.read_into(name, tensors[name])
    file.close()
    targets = config.get("target_modules") or ()
    adapter = PeftAdapter(
        tensors,
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        base_model=config.get("base_model_name_or_path"),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
    )
    _level_scales(path, adapter, config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
    return adapter


def _refuse_unsupported(path: Path, config: Mapping[str, Any]) -> None:
    found = {key: value for key, value in config.items() if key not in _HARMLESS | _UNDERSTOOD and value}
    found |= {"peft_type": config.get("peft_type")} if config.get("peft_type") != "LORA" else {}
    found |= {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
    init = config.get("init_lora_weights")
    found |= {"init_lora_weights": init} if init not in _PLAIN_INITS else {}
    if found:
        settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(found.items()))
        raise ConversionError(f"adapter {path} is of a kind that cannot be converted exactly ({settings}); merge it into its base with peft instead")


def _level_scales(path: Path, adapter: PeftAdapter, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    for module in adapter.modules:
        name_a, name_b = f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"
        rank, alpha = ranks.get(_pattern_key(ranks, module), adapter.rank), alphas.get(_pattern_key(alphas, module), adapter.alpha)
        if name_a not in adapter.tensors or name_b not in adapter.tensors or adapter.tensors[name_a].shape[0] != rank:
            raise ModelError(f"{path}: the adapter of {module} lacks a half or is not of rank {rank}, as {CONFIG_FILE} has it; copy it again")
        ratio = lora_scale(alpha, rank, adapter.use_rslora) / adapter.scale
        if ratio != 1.0:
            b = adapter.tensors[name_b]
            adapter.tensors[name_b] = (b.double() * ratio).to(b.dtype)


def _pattern_key(patterns: Iterable[str], module: str) -> str:
    """The first pattern that PEFT would apply to a module (peft.utils.get_pattern_key)."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
