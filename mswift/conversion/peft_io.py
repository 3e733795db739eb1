"""A PEFT adapter directory: ``adapter_model.safetensors`` (or, read only, ``.bin``) and ``adapter_config.json``, as ``peft`` itself has them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mswift.conversion.adapters import PREFIX, adapted_modules, module_of
from mswift.conversion.directories import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ADAPTER_PICKLE, adapter_weights, read_adapter_config
from mswift.conversion.expert_adapters import BEFORE_019, INNER, ExpertStack, expert_modules, form_of, installed_form, parameter_of, stacked_tensors
from mswift.conversion.file_forms import inner_name
from mswift.conversion.pickles import notice, open_pickle
from mswift.conversion.rules import AnyRule, ExpertSlot, Rule
from mswift.conversion.safetensors_io import SafetensorsFile, TensorFile, TensorSpec, save_file
from mswift.conversion.staging import SmallFile, put_files, staged
from mswift.errors import ConversionError, ModelError

WEIGHTS_FILE, CONFIG_FILE = ADAPTER_FILE, ADAPTER_CONFIG_FILE

# Settings of LoraConfig that say nothing about what a finished adapter computes; any other that is set is refused.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "target_parameters", "task_type"),
}
_UNDERSTOOD = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights"}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights on loading


_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as read: A [r, in] and B [out, r] by PEFT name; every module has the one ``scale``.

    Embeddings have the names and shapes of linear layers here, modules the names that they have in a checkpoint. Adapters of all experts of a
    layer are as in the file, in the ``form`` of the peft that wrote it; ``target_parameters`` says for which parameters. ``base_tensors``: those of
    the base that the file carries along, as peft does with an adapted embedding or head, by their names in a checkpoint.
    """

    tensors: dict[str, torch.Tensor]
    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    base_model: str | None
    target_modules: str | tuple[str, ...]
    use_dora: bool = False
    target_parameters: tuple[str, ...] = ()
    form: str = ""
    base_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class WrittenAdapter:
    """The tensors of an adapter that is to be written, by PEFT name, and what its config says of them.

    Args:
        tensors: A ``[r, in]``, B ``[out, r]`` and magnitudes ``[out]``; embeddings as linear layers. stacks: those of all experts of a layer,
            in the form `form`. embeddings: modules that are one. target_modules: None: the last name part of every adapted module.
        target_parameters: names of parameters that peft adapts in place of modules.
    """

    tensors: Mapping[str, torch.Tensor]
    stacks: Sequence[ExpertStack] = ()
    form: str = ""
    embeddings: Collection[str] = ()
    target_modules: Iterable[str] | None = None
    target_parameters: Collection[str] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        plain = [tensor.shape[0] for name, tensor in self.tensors.items() if name.endswith(_A)]
        return max([*plain, *(stack.rank for stack in self.stacks)], default=0)

    def files_tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """What the file holds, all of one rank."""
        padded = {name: _pad(name, tensor, rank) for name, tensor in self.tensors.items()}
        for module in self.embeddings:
            prefix = f"{PREFIX}{module}"
            a, b = padded.pop(prefix + _A), padded.pop(prefix + _B)
            padded |= {prefix + _EMBEDDING_A: b.t().contiguous(), prefix + _EMBEDDING_B: a.t().contiguous()}
        return dict(sorted((padded | stacked_tensors(self.stacks, rank, self.form)).items()))


def write_peft(
    directory: str | Path,
    tensors: Mapping[str, torch.Tensor] | WrittenAdapter,
    *,
    base_model: str | None,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    extra_files: Iterable[SmallFile] = (),
    exist_ok: bool = False,
) -> Path:
    """Write an adapter directory that `peft` and vLLM load; it appears whole or not at all. One process.

    Modules of different rank (stacked adapters) are brought to the largest by zeros, and alpha raised to keep the scale, rather than
    written with ``rank_pattern``, which not every reader heeds.

    Args:
        tensors: by PEFT name, from `lora_to_peft`, or with more to be said of them. base_model: id or path of the base, or None.
        rank, alpha, use_rslora: give the scale. dropout: written as 0 where parameters are adapted, for which peft has none.
        extra_files: copied by name, or written.

    Raises:
        ConversionError: no tensors, names that are not those of an adapter, or the directory cannot be written.
    """
    adapter = tensors if isinstance(tensors, WrittenAdapter) else WrittenAdapter(tensors)
    modules = adapted_modules(adapter.tensors)
    if not modules and not adapter.stacks:
        raise ConversionError(f"no adapter to write to {directory}: no layer has one; check target_modules")
    width = adapter.rank
    scale = lora_scale(alpha, rank, use_rslora)
    config = _config(base_model, width, alpha if width == rank else scale * (math.sqrt(width) if use_rslora else width), use_rslora, use_dora)
    names = {module.rsplit(".", 1)[-1] for module in modules} if adapter.target_modules is None else adapter.target_modules
    config |= {"target_modules": sorted(names), "lora_dropout": 0.0 if adapter.target_parameters else dropout}
    config |= {"target_parameters": sorted(adapter.target_parameters)} if adapter.target_parameters else {}
    config |= {"peft_version": "0.18.1" if adapter.form == BEFORE_019 else "0.19.1"} if adapter.stacks else {}  # by which readers tell the form
    padded = adapter.files_tensors(width)
    nbytes = sum(TensorSpec(tensor.dtype, tuple(tensor.shape)).nbytes for tensor in padded.values())
    with staged(Path(directory), exist_ok, nbytes) as temporary:
        save_file(temporary / WEIGHTS_FILE, padded)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        put_files(extra_files, temporary)
    return Path(directory)


def _pad(name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    if tensor.dim() == 1:  # a magnitude
        return tensor
    dim = 0 if name.endswith(_A) else 1
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = (missing, tensor.shape[1]) if dim == 0 else (tensor.shape[0], missing)
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _config(base_model: str | None, rank: int, alpha: float, use_rslora: bool, use_dora: bool) -> dict[str, Any]:
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
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "task_type": "CAUSAL_LM",
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }


def read_peft(directory: str | Path, rules: Sequence[AnyRule] = ()) -> PeftAdapter:
    """Read an adapter directory; the adapters are small, so all tensors come at once. Those of a text part get the names that it has alone.

    Where ``rank_pattern`` or ``alpha_pattern`` give modules a scale of their own, their B takes the difference up, so that one scale holds.

    Args:
        rules: of the base; they say which modules hold all experts of a layer, and which are called otherwise in a checkpoint.

    Raises:
        ModelError: not an adapter directory, or its files are damaged.
        ConversionError: an adapter of a kind that has no counterpart here (biases, whole modules saved, ...).
    """
    path = Path(directory)
    config = read_adapter_config(path)
    _refuse_unsupported(path, config)
    file = _open_weights(path)
    tensors = {}
    for name, spec in file.specs.items():
        inner = PREFIX + inner_name(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name
        tensors[inner] = torch.empty(spec.shape, dtype=spec.dtype)
        file.read_into(name, tensors[inner])
    file.close()
    targets = config.get("target_modules") or ()
    version = config.get("peft_version")
    carried = {name: _base_name(name) for name in tensors if ".lora_" not in name and name.endswith((".weight", ".bias"))}
    adapter = PeftAdapter(
        _as_linears({name: tensor for name, tensor in tensors.items() if name not in carried}),
        base_tensors={carried[name]: tensor for name, tensor in tensors.items() if name in carried},
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        base_model=config.get("base_model_name_or_path"),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        use_dora=bool(config.get("use_dora")),
        target_parameters=tuple(sorted(config.get("target_parameters") or ())),
        form=form_of(version) if version else installed_form(),
    )
    ranks, alphas = ({inner_name(name): value for name, value in (config.get(key) or {}).items()} for key in ("rank_pattern", "alpha_pattern"))
    _level_scales(path, adapter, ranks, alphas, expert_modules(rules))
    _use_checkpoint_names(adapter.tensors, rules)
    return adapter


def _open_weights(path: Path) -> TensorFile:
    weights = adapter_weights(path)
    if weights.name != ADAPTER_PICKLE:
        return SafetensorsFile(weights)
    notice(path)
    return open_pickle(weights, {})


def _base_name(name: str) -> str:
    """What a checkpoint calls a tensor of the base that an adapter's file has."""
    module, _, kind = name.removeprefix(PREFIX).rpartition(".")
    return f"{module.removesuffix(INNER)}.{kind}"


def _as_linears(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors of embeddings under the names and in the shapes of those of linear layers."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(_EMBEDDING_A):
            found[name.removesuffix(_EMBEDDING_A) + _B] = tensor.t().contiguous()
        elif name.endswith(_EMBEDDING_B):
            found[name.removesuffix(_EMBEDDING_B) + _A] = tensor.t().contiguous()
        else:
            found[name] = tensor
    return found


def _use_checkpoint_names(tensors: dict[str, torch.Tensor], rules: Sequence[AnyRule]) -> None:
    for rule in rules:
        if isinstance(rule, Rule) and rule.module is not None:
            for kind in (_A, _B):
                name = f"{PREFIX}{rule.module}{kind}"
                if name in tensors:
                    tensors[f"{PREFIX}{module_of(rule.sources[0])}{kind}"] = tensors.pop(name)


def _refuse_unsupported(path: Path, config: Mapping[str, Any]) -> None:
    found = {key: value for key, value in config.items() if key not in _HARMLESS | _UNDERSTOOD and value}
    found |= {"peft_type": config.get("peft_type")} if config.get("peft_type") != "LORA" else {}
    found |= {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
    init = config.get("init_lora_weights")
    found |= {"init_lora_weights": init} if init not in _PLAIN_INITS else {}
    if found:
        settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(found.items()))
        raise ConversionError(f"adapter {path} is of a kind that cannot be converted exactly ({settings}); merge it into its base with peft instead")


def _level_scales(path: Path, adapter: PeftAdapter, ranks: Mapping[str, int], alphas: Mapping[str, float], experts: Mapping[str, ExpertSlot]) -> None:
    for module in adapter.modules:
        name_a, name_b = f"{PREFIX}{module}{_A}", f"{PREFIX}{module}{_B}"
        name, count = _pattern_name(module, adapter, experts)
        rank, alpha = ranks.get(_pattern_key(ranks, name), adapter.rank), alphas.get(_pattern_key(alphas, name), adapter.alpha)
        if name_a not in adapter.tensors or name_b not in adapter.tensors or adapter.tensors[name_a].shape[0] != rank * count:
            raise ModelError(f"{path}: the adapter of {module} lacks a half or is not of rank {rank}, as {CONFIG_FILE} has it; copy it again")
        ratio = lora_scale(alpha, rank, adapter.use_rslora) / adapter.scale
        if ratio != 1.0:
            b = adapter.tensors[name_b]
            adapter.tensors[name_b] = (b.double() * ratio).to(b.dtype)


def _pattern_name(module: str, adapter: PeftAdapter, experts: Mapping[str, ExpertSlot]) -> tuple[str, int]:
    """What patterns call an adapted module or parameter, and how many weights its adapter is for."""
    holder = module.removesuffix(INNER)
    if holder in experts:
        parameter = "gate_up_proj" if module != holder else parameter_of(holder, adapter.tensors, adapter.target_parameters)
        return f"{holder}.{parameter}", experts[holder].count
    weight = f"{module}.weight"
    return (weight if any(f".{weight}".endswith(f".{target}") for target in adapter.target_parameters) else module), 1


def _pattern_key(patterns: Iterable[str], name: str) -> str:
    """The first pattern that PEFT would apply to a module of this name (peft.utils.get_pattern_key)."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), name)
