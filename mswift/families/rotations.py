"""Inverse frequencies of rotary positions from a config: one code path, by transformers' own functions."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from mswift.errors import ModelError
from mswift.families.base import HfConfig, Rotation

if TYPE_CHECKING:
    import torch

ROTARY_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def rotation(hf: HfConfig, head_dim: int, layer_type: str | None = None) -> Rotation:
    """The rotation that ``rope_parameters`` describe.

    Args:
        head_dim: columns of a head; ``partial_rotary_factor`` of them are rotated. layer_type: where the parameters are given by layer type.

    Raises:
        ModelError: a rotary type of which the exact form is not known here.
    """
    parameters = hf.rope_parameters if layer_type is None else hf.rope_parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in ROTARY_TYPES:
        raise ModelError(f"rotary type {kind!r} is not supported exactly; wanted one of {', '.join(ROTARY_TYPES)}")
    alpha = parameters.get("alpha") if kind == "dynamic" else None  # Hunyuan: the base grows once and for all
    if kind == "default" or alpha:
        width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        theta = parameters["rope_theta"] * (alpha ** (width / (width - 2)) if alpha else 1.0)
        return Rotation(functools.partial(_plain, float(theta), width))
    own = copy.deepcopy(hf)
    if layer_type is not None:
        own.rope_parameters = dict(parameters)
    own.head_dim = head_dim
    factor = _scaled(own, kind, 0)[1]
    limits = {"dynamic": hf.max_position_embeddings, "longrope": parameters.get("original_max_position_embeddings")}
    limit = int(limits[kind]) if kind in limits else None

    def inv_freq_of(length: int) -> torch.Tensor:
        return _scaled(own, kind, 0 if limit is None or length <= limit else length)[0]

    return Rotation(inv_freq_of, float(factor), limit, continuous=kind == "dynamic")


def _plain(theta: float, width: int, _length: int) -> torch.Tensor:
    import torch

    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


def _scaled(hf: HfConfig, kind: str, length: int) -> tuple[torch.Tensor, Any]:
    """(inverse frequencies, factor on cosine and sine); `length` 0: any within the model's own limit."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"), seq_len=length or None)
    return inv_freq.float(), factor
