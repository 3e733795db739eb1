"""Fields of a config.json that would change the model and that nothing here reads: better refused than passed over."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription, ModelFamily

_OF_NO_EFFECT = frozenset(
    [
        *("architectures", "auto_map", "model_type", "name_or_path", "id2label", "label2id", "tokenizer_class", "use_cache", "cache_implementation"),
        *("dtype", "torch_dtype", "initializer_range", "init_std", "pretraining_tp", "unsloth_fixed", "is_decoder", "is_encoder_decoder"),
        *("output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing", "problem_type", "task_specific_params"),
        *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences"),
        *("chunk_size_feed_forward", "transformers.js_config", "finetuning_task", "quantization_config", "aux_loss_alpha", "seq_aux", "ep_size"),
        *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
    ]
)
"""Names, tokens, how a model is initialised, served or generated from, layers beside the model that predict further tokens; what a quantised
one means is the reader's to know."""
_DROPOUT = frozenset(
    [
        *("residual_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "embedding_dropout", "classifier_dropout", "dropout"),
        "input_jitter_noise",
    ]
)
"""Rates and noise of training that training here leaves at 0."""
_SAID_OTHERWISE = {
    "rope_parameters": (
        "rope_scaling",
        "rope_theta",
        "rope_local_base_freq",
        "rope_type",
        "partial_rotary_factor",
        "rotary_pct",
        "original_max_position_embeddings",
    ),
    "layer_types": (
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "max_window_layers",
        "global_attn_every_n_layers",
        "full_attention_interval",
    ),
    "no_rope_layers": ("no_rope_layer_interval",),
    "moe_layers": ("interleave_moe_layer_step",),
    "hidden_activation": ("hidden_act",),
}
"""A field that is read, and what transformers makes it from."""


def _watched(hf: HfConfig, read: set[str]) -> HfConfig:
    """The same config, noting in `read` which of its attributes are read."""

    def note(self: HfConfig, name: str) -> Any:
        read.add(name)
        return super(watching, self).__getattribute__(name)

    watching: Any = type(type(hf).__name__, (type(hf),), {"__getattribute__": note})
    copied = copy.copy(hf)
    copied.__class__ = watching
    read.clear()
    return copied


def unknown_fields(raw: Mapping[str, Any], hf: HfConfig, describe: Callable[[HfConfig], MegatronDescription]) -> dict[str, Any]:
    """The entries of a config.json that `describe` does not read although they are not at the value that a config has without them.

    Args:
        raw: config.json. hf: the transformers config made of it.
    """
    read: set[str] = set()
    describe(_watched(hf, read))
    read |= {name for pair in type(hf).attribute_map.items() if read.intersection(pair) for name in pair}
    known = _OF_NO_EFFECT | _DROPOUT | read
    known |= {name for field, names in _SAID_OTHERWISE.items() if field in read for name in names}
    plain = type(hf)().to_dict()
    asked = {
        name: value for name, value in raw.items() if name not in known and not name.startswith("_") and not name.endswith(("_token_id", "_version"))
    }
    return {name: value for name, value in asked.items() if value not in (None, False, [], {}) and value != plain.get(name)}


def describe_checked(family: ModelFamily, raw: Mapping[str, Any], hf: HfConfig, where: str, *, allow_unknown: bool = False) -> MegatronDescription:
    """The family's description of a config.

    Args:
        raw, hf: config.json, and the transformers config made of it. allow_unknown: go on with `unknown_fields`.

    Raises:
        ModelError: fields that may change the model are not understood (all are listed), or the config is of another family.
    """
    try:
        unknown = {} if allow_unknown else unknown_fields(raw, hf, family.describe)
        description = family.describe(hf)
    except AttributeError as error:
        names = ", ".join(raw.get("architectures") or ())
        raise ModelError(f"{where}: architectures {names} and model_type {hf.model_type} are of different families ({error}); mend it") from error
    if unknown:
        listed = ", ".join(f"{name} = {json.dumps(value)[:80]}" for name, value in unknown.items())
        raise ModelError(
            f"{where}: {len(unknown)} field(s) that may change the model are not understood ({listed}); "
            "--allow_unknown_config true goes on as if they were not there"
        )
    return description
