"""Keys of distributed checkpoints: what other Megatron programs call the same tensors, and the empty states that their readers ask for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from mswift.families.te_names import BOTH_FORMS

FOREIGN = ("optimizer.", "chained_", "rng_state", "opt_param_scheduler", "rerun_state_machine_state")
"""How the keys begin that a training checkpoint has beside the weights."""
EXTRA_STATE = "_extra_state"
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")


def is_single(stored: Iterable[str]) -> bool:
    """Whether a checkpoint has a key for each expert, and for gate and up each (megatron's ``singleton_local_shards``)."""
    return any(re.search(r"\.experts\.experts\.\d+\.|linear_fc1\.(weight|bias)_[wv]$", key) for key in stored)


def fit_to_stored(shard: ShardedTensor, stored: Collection[str], num_layers: int) -> None:
    """Give a tensor that is to be read the key under which a checkpoint has it, if it has it under another one than ours.

    A norm may be a part of the linear layer behind it or not (Transformer Engine and local spec), and the layers of a model may be one tensor
    with a dim more, or a tensor each.

    Args:
        stored: keys of the checkpoint. num_layers: of the whole model.
    """
    for key in _norm_forms(shard.key):
        if key in stored:
            shard.key = key
            return
        numbered = _LAYER.fullmatch(key)
        if numbered is not None and numbered[1] + numbered[3] in stored:
            shard.key = numbered[1] + numbered[3]
            _prepend(shard, int(numbered[2]), num_layers)
            return
        if key.startswith("decoder.layers.") and numbered is None and shard.prepend_axis_num:
            single = key.replace("decoder.layers.", f"decoder.layers.{shard.global_offset[0]}.", 1)
            if single in stored:
                shard.key = single
                _drop_first(shard)
                return


def _norm_forms(key: str) -> Iterator[str]:
    yield key
    if key.startswith("mtp."):  # newer megatron-core calls the block inside by another name
        yield key.replace(".transformer_layer.", ".mtp_model_layer.")
    for own, fused in BOTH_FORMS:
        for one, other in ((own, fused), (fused, own)):
            if f".{one}" in key:
                yield key.replace(f".{one}", f".{other}")


def _prepend(shard: ShardedTensor, index: int, size: int) -> None:
    shard.global_shape, shard.global_offset = (size, *shard.global_shape), (index, *shard.global_offset)
    shard.axis_fragmentations = (size, *(shard.axis_fragmentations or ()))
    shard.prepend_axis_num += 1


def _drop_first(shard: ShardedTensor) -> None:
    shard.global_shape, shard.global_offset = shard.global_shape[1:], shard.global_offset[1:]
    shard.axis_fragmentations = (shard.axis_fragmentations or ())[1:]
    shard.prepend_axis_num -= 1


def add_extra_states(chunk: dict[str, Any]) -> None:
    """What the modules of the Transformer Engine spec ask for that ours do not have: attention without parameters, norms by themselves.

    Args:
        chunk: sharded state of one model chunk by local name; the linear layers in it have such states already.
    """
    pattern = re.compile(r"(.+\.)self_attention\.(linear_proj|out_proj)\._extra_state")
    norms = ("input_layernorm", "pre_mlp_layernorm", *(f"self_attention.{norm}" for norm in ("q_layernorm", "k_layernorm", "out_norm")))
    for name, state in list(chunk.items()):
        match = pattern.fullmatch(name)
        if match is None or not isinstance(state, ShardedObject):
            continue
        layer = pattern.fullmatch(state.key)
        assert layer is not None
        parts = [norm for norm in norms if f"{match[1]}{norm}.weight" in chunk and chunk[f"{match[1]}{norm}.weight"].key.endswith(f"{norm}.weight")]
        if match[2] == "linear_proj":
            parts.append("self_attention.core_attention")
        for part in parts:
            chunk[f"{match[1]}{part}.{EXTRA_STATE}"] = replace(state, key=f"{layer[1]}{part}.{EXTRA_STATE}")
    final = chunk.get("decoder.final_layernorm.weight")
    if final is not None:
        key = f"decoder.final_layernorm.{EXTRA_STATE}"
        chunk[key] = ShardedObject(key, None, (1,), (0,), replica_id=final.replica_id)
