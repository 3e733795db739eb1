"""A `MegatronModel` to and from a Megatron checkpoint: megatron-core's ``torch_dist`` format, readable by other Megatron tools, in any layout.

The directory holds what a Hugging Face directory holds beside its weights (config, tokenizer), so that it stands for the model everywhere:

    latest_checkpointed_iteration.txt   "release", the word by which Megatron-LM finds the next
    release/                            the distributed checkpoint
    mswift.json                         family, dtype, and the layout that wrote it
    config.json, tokenizer files        of the Hugging Face model
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from mswift.conversion.coverage import fail_on, gap, rules_by_target
from mswift.conversion.directories import ADAPTER_CONFIG_FILE, CONFIG_FILE, MCORE_FILE, MCORE_WEIGHTS, megatron_weights, read_json
from mswift.conversion.dist_checkpoint import PartsWriter, StoredTensors, load_tensors, save_state, stored_shapes
from mswift.conversion.export import plain_config
from mswift.conversion.load import LocalParameter, Progress, gather_names
from mswift.conversion.staging import TextFile, begin_draft, check_space, check_target, draft_of, parse_size, publish, put_files, stamp_of
from mswift.engines.further import NOTE_FILE, PREFIX, names_of_copies
from mswift.engines.megatron_keys import EXTRA_STATE, FOREIGN, add_extra_states, fit_to_stored, is_single
from mswift.errors import CheckpointError
from mswift.families.base import text_config
from mswift.families.common import FURTHER_LAYERS
from mswift.families.modules import CausalLM
from mswift.log import is_main_process
from mswift.parallel.agree import agree, attempt
from mswift.parallel.layout import ParallelLayout
from mswift.tuners.lora import LoraSettings

if TYPE_CHECKING:
    from mswift.engines.megatron_model import MegatronModel

_PART = 5 * 10**8  # bytes of a file: several, so that the disk writes one while the next is read
_FACTORS = (".lora_a", ".lora_b", ".lora_magnitude")
_LAYOUT_FREE = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written by all ranks: tensors, bytes, files, and how many of these an earlier attempt had finished."""

    directory: Path
    tensors: int
    bytes: int
    files: int
    reused: int


def write_checkpoint(
    model: MegatronModel,
    directory: Path,
    *,
    resume: bool = False,
    exist_ok: bool = False,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> WriteReport:
    """Write a Megatron checkpoint; all ranks call it. Weights that the model has not read yet are read just before they are written.

    Args:
        resume: go on where a killed attempt was; finished files are neither read nor written again.

    Raises:
        ConversionError: the target is taken, or there is no space. CheckpointError: a rank could not write; what is finished stays for `resume`.
    """
    draft, own = draft_of(directory), torch.tensor(sum(part.numel() * part.element_size() for chunk in model.chunks for part in chunk.parameters()))
    dist.all_reduce(own)

    def begin() -> None:
        if is_main_process():
            check_target(directory, exist_ok)
            begin_draft(directory, _identity(model), resume)
            written = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
            check_space(draft, int(own) // (model.groups.layout.dp * model.groups.layout.cp) - written)

    agree(attempt(begin), f"writing {directory}")
    writer = PartsWriter(draft / MCORE_WEIGHTS, min(parse_size(max_shard_size), _PART), model, progress)
    names = gather_names(shard.key for shard in _shards(_sharded(model)))
    described = _sharded(model)
    for chunk in described.values():
        _share_out(chunk, model.groups.layout)
        add_extra_states(chunk)
    state = {**described, "content_metadata": _LAYOUT_FREE, "checkpoint_version": 3.0, "iteration": 0}
    try:
        save_state(state, draft / MCORE_WEIGHTS, f"writing {directory}", writer=writer)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; mend that and go on with --resume true") from error
    dtype = str(model.dtype).removeprefix("torch.")
    note: dict[str, Any] = {"family": model.family.name, "dtype": dtype, "layout": model.groups.layout.describe()}
    wider = sorted(gather_names(model.held_wider))
    note |= {"held_wider": wider} if wider else {}
    note |= {"stacked": sorted(model.stacked)} if model.stacked else {}
    if copies := names_of_copies(model):
        note["copies"] = copies
    path = model.settings.directory / CONFIG_FILE
    texts = {NOTE_FILE: note, CONFIG_FILE: plain_config(text_config(read_json(path), str(path)), dtype)}
    agree(attempt(lambda: _finish(draft, directory, texts, model.tokenizer_files())), f"writing {directory}")
    figures = torch.tensor([writer.bytes, writer.num_files, writer.reused])
    dist.all_reduce(figures)
    nbytes, files, reused = (int(figure) for figure in figures)
    return WriteReport(directory, len(names), nbytes, files, reused)


def _finish(draft: Path, directory: Path, texts: Mapping[str, Any], beside: Iterable[Path | TextFile]) -> None:
    if not is_main_process():
        return
    (draft / MCORE_FILE).write_text(f"{MCORE_WEIGHTS}\n", encoding="utf8")
    for name, content in texts.items():
        (draft / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    put_files(beside, draft)
    publish(draft, directory)


def _identity(model: MegatronModel) -> dict[str, Any]:
    """What a half-written checkpoint must have in common with the attempt that goes on with it."""
    return {"source": stamp_of(model.settings.directory), "dtype": str(model.dtype), "layout": model.groups.layout.describe()}


def stacked_of(directory: Path) -> frozenset[str]:
    """The stacks of experts that the source of a Megatron checkpoint had; see `file_forms.stacked_in`."""
    note = directory / NOTE_FILE
    return frozenset(read_json(note).get("stacked", ())) if note.is_file() else frozenset()


def wider_names(directory: Path) -> set[str]:
    """The weights of a Megatron checkpoint that it has in fp32, and that its source had in the dtype of the rest."""
    note = directory / NOTE_FILE
    return set(read_json(note).get("held_wider", ())) if note.is_file() else set()


def read_checkpoint(model: MegatronModel, parameters: list[LocalParameter], *, deferred: bool = False) -> StoredTensors | None:
    """Fill the model from its directory; all ranks call it.

    Args:
        parameters: all of this rank, with their names in the whole model. deferred: read nothing yet; gives what reads them.

    Raises:
        CheckpointError: unreadable, or not of this model.
    """
    stored = _fill(model, model.settings.directory, _padded(model, parameters), deferred=deferred)
    if stored is not None:
        stored.keep(parameter.tensor for parameter in parameters)
    return stored


def _fill(model: MegatronModel, directory: Path, padded: set[int], *, deferred: bool = False) -> StoredTensors | None:
    """Read base or adapter in place. `padded`: storages that may be longer or shorter in the file, by zeros."""
    folder = megatron_weights(directory)
    stored = {key: shape for key, shape in stored_shapes(folder).items() if not key.startswith(FOREIGN)}
    state = _sharded(model, singly=is_single(stored))
    for chunk in state.values():
        for name in [name for name in chunk if name.endswith(EXTRA_STATE)]:
            del chunk[name]  # written for readers that ask for it; empty without Transformer Engine
    if not model.description.built_further and model.lora is None:
        unread = [key for key in stored if key.startswith(PREFIX)]
        model.unread = {FURTHER_LAYERS: len(unread)} if unread else {}
        stored = {key: shape for key, shape in stored.items() if key not in unread}
    for shard in _shards(state):
        fit_to_stored(shard, stored, model.config.num_layers)
    wanted = {shard.key for shard in _shards(state)}
    everywhere = gather_names(wanted)
    fail_on(
        [
            *gap("tensor", everywhere - stored.keys(), "missing from the checkpoint"),
            *gap("tensor", stored.keys() - everywhere, "that no parameter reads"),
        ],
        f"load {directory}",
    )
    for shard in _shards(state):
        base = shard.data.untyped_storage().data_ptr() if shard.data is not None else 0
        if tuple(shard.global_shape) != stored[shard.key] and base in padded:
            shard.allow_shape_mismatch = True
    try:
        return load_tensors(state, folder, deferred=deferred)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}; convert it again") from error


def write_adapter(model: MegatronModel, directory: Path, *, base_model: str, exist_ok: bool = False) -> None:
    """Write the model's adapter as a Megatron checkpoint of its factors, with its settings beside; all ranks call it.

    Raises:
        ConversionError: the target is taken. CheckpointError: a rank could not write.
    """
    assert model.lora is not None
    draft, lora = draft_of(directory), model.lora
    config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.use_rslora}
    modules = None if lora.modules is None else sorted(lora.modules)
    config |= {"target_modules": list(lora.targets), "use_dora": lora.use_dora, "modules": modules, "base_model_name_or_path": base_model}

    def begin() -> None:
        if is_main_process():
            check_target(directory, exist_ok)
            begin_draft(directory, {}, resume=False)

    agree(attempt(begin), f"writing {directory}")
    save_state({**_sharded(model), "content_metadata": _LAYOUT_FREE}, draft / MCORE_WEIGHTS, f"writing {directory}")
    agree(attempt(lambda: _finish(draft, directory, {ADAPTER_CONFIG_FILE: config}, model.tokenizer_files())), f"writing {directory}")


def read_adapter(model: MegatronModel, directory: Path) -> None:
    """Put a Megatron adapter on a model; all ranks call it.

    Raises:
        CheckpointError: unreadable. ConversionError: of another model.
    """
    config = read_json(directory / ADAPTER_CONFIG_FILE)
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
    rank, alpha, dropout, use_rslora, targets = (config[name] for name in names)
    modules, dora = config.get("modules"), bool(config.get("use_dora"))
    only = None if modules is None else frozenset(modules)
    model.add_lora(LoraSettings(rank, alpha, dropout, use_rslora, tuple(targets), use_dora=dora, modules=only))
    factors = [(name, factor) for name, module in model.adapters() for factor in module.factors.values()]
    _fill(model, directory, {factor.untyped_storage().data_ptr() for name, factor in factors if rules_by_target(model.rules)[name].pads})


def _padded(model: MegatronModel, parameters: list[LocalParameter]) -> set[int]:
    """Storages of the parameters that a layout may pad with zeros behind the real rows or columns."""
    rules = rules_by_target(model.rules)
    return {parameter.tensor.untyped_storage().data_ptr() for parameter in parameters if rules[parameter.name].pads}


def layers_alone(model: MegatronModel) -> dict[str, bool]:
    """Metadata by which megatron describes each layer under a key of its own, as it must where an adapter is on some of them only."""
    return {"non_homogeneous_layers": True} if model.lora is not None and model.lora.modules is not None else {}


def _sharded(model: MegatronModel, *, singly: bool = False) -> dict[str, Any]:
    """megatron's description of the base weights, or of the adapter if there is one, by chunk, as Megatron-LM keys them.

    Args:
        singly: each expert, and gate and up, under keys of their own, as megatron writes them where it is told so.
    """

    def described(chunk: CausalLM) -> dict[str, Any]:
        metadata = ensure_metadata_has_dp_cp_group({**_LAYOUT_FREE, **layers_alone(model), "singleton_local_shards": singly})
        found = chunk.sharded_state_dict(metadata=metadata).items()
        return {name: entry for name, entry in found if (model.lora is not None) == name.endswith(_FACTORS)}

    alone = len(model.chunks) == 1
    return {"model" if alone else f"model{number}": described(chunk) for number, chunk in enumerate(model.chunks)}


def _share_out(chunk: dict[str, Any], layout: ParallelLayout) -> None:
    """Let data-parallel replicas write the parameters that all of them hold in turn; megatron's description has the first of them write all."""
    written = [0] * (layout.dp * layout.cp)
    for name, entry in chunk.items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and ".experts." not in name:
            writer = written.index(min(written))
            written[writer] += entry.data.nbytes
            *others, replica = entry.replica_id
            entry.replica_id = (*others, (replica - writer) % len(written))


def _shards(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Every tensor of a sharded state; those that megatron keeps in two parts (gate and up) become two."""
    for chunk in state.values():
        for name, entry in chunk.items():
            if isinstance(entry, ShardedTensorFactory):
                chunk[name] = entry.build()
        yield from (shard for entry in chunk.values() for shard in _flat(entry))


def _flat(entry: Any) -> Iterator[ShardedTensor]:
    if isinstance(entry, ShardedTensor):
        yield entry
    elif isinstance(entry, dict | list):
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _flat(part)
