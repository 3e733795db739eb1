"""Layers that predict tokens further ahead (MTP) of a checkpoint: how many there are, and what an export writes of them besides parameters.

A checkpoint has copies of the embedding and the head in such a layer, which are no parameters of the model. Where the layers are not built,
their tensors go from a Hugging Face directory to an export as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mswift.conversion.coverage import drops_of
from mswift.conversion.directories import megatron_weights, read_json
from mswift.conversion.dist_checkpoint import stored_shapes
from mswift.conversion.export_plan import ExportParameter
from mswift.conversion.rules import PaddedRows, Rename, Rule
from mswift.conversion.safetensors_io import TensorReader
from mswift.conversion.shards import Shard
from mswift.families.base import HfConfig, ModelFamily
from mswift.families.common import SHARED_COPY
from mswift.families.model import base_parameters

if TYPE_CHECKING:
    from mswift.engines.megatron_model import MegatronModel

NOTE_FILE = "mswift.json"
PREFIX = "mtp."
"""How megatron-core's names of these layers begin."""
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def count_in(directory: Path, family: ModelFamily, hf: HfConfig, reader: TensorReader | None) -> int:
    """How many such layers a checkpoint has; `reader`: of a Hugging Face directory."""
    if reader is not None:
        return family.count_further(hf, reader.names)
    numbers = {match[1] for key in stored_shapes(megatron_weights(directory)) if (match := re.match(r"mtp\.layers\.(\d+)\.", key))}
    return len(numbers)


def names_of_copies(model: MegatronModel) -> list[str]:
    """The tensors that are copies of the embedding or of the head in the checkpoint that the model is read from."""
    if not model.description.built_further:
        return []
    if model.reader is None:
        path = model.settings.directory / NOTE_FILE
        return list(read_json(path).get("copies", [])) if path.is_file() else []
    drops = [drop for drop in drops_of(model.rules) if drop.reason == SHARED_COPY]
    return sorted(name for name in model.reader.names if any(drop.matches(name) for drop in drops))


def carried(model: MegatronModel, value: Callable[[str, Tensor], Tensor], *, own_head: bool) -> tuple[list[ExportParameter], list[Rule]]:
    """What an export writes besides the parameters of this rank, and the rules of what all ranks write.

    Args:
        value: what is exported of a parameter, by name. own_head: a tied model gets a head of its own, the embedding without its adapter.
    """
    copies = _copies(model, [*names_of_copies(model), *(["lm_head.weight"] if own_head else [])], value)
    if model.reader is None:
        return copies
    told = [drop for drop in drops_of(model.rules) if drop.told]
    plain = _as_they_are(model, sorted(name for name in model.reader.names if any(drop.matches(name) for drop in told)), model.reader)
    return copies[0] + plain[0], copies[1] + plain[1]


def _copies(model: MegatronModel, names: Iterable[str], value: Callable[[str, Tensor], Tensor]) -> tuple[list[ExportParameter], list[Rule]]:
    rows, padded, tied = model.description.vocab_size, model.description.padding(model.groups.layout.tp).vocab, model.description.tied
    own = {name: (parameter, shard) for chunk in model.chunks[-1:] for name, parameter, shard in base_parameters(chunk, model.groups)}

    def bare(_name: str, parameter: Tensor) -> Tensor:
        model.ensure(parameter)
        return parameter.detach()

    parameters: list[ExportParameter] = []
    rules: list[Rule] = []
    for name in names:
        rules.append(PaddedRows(f"copy.{name}", name, rows, padded))
        is_head = not name.endswith("embed_tokens.weight")
        original = HEAD if is_head and HEAD in own else EMBEDDING  # in a tied model the last of several stages may have the one or the other
        if model.groups.is_last_stage:
            parameter, shard = own[original]
            of = functools.partial(bare if is_head and tied else value, original, parameter)
            parameters.append(ExportParameter(f"copy.{name}", tuple(parameter.shape), parameter.dtype, shard, of))
    return parameters, rules


def _as_they_are(model: MegatronModel, names: Iterable[str], reader: TensorReader) -> tuple[list[ExportParameter], list[Rule]]:
    parameters: list[ExportParameter] = []
    rules: list[Rule] = []
    for name in names:
        rules.append(Rename(f"carried.{name}", name))
        if model.groups.is_last_stage:
            shape = reader.shape(name)
            value = functools.partial(reader.read, name, slice(0, shape[0]), None)
            parameters.append(ExportParameter(f"carried.{name}", shape, reader.dtype(name), Shard(), value))
    return parameters, rules
