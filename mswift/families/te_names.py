"""Names of megatron-core's Transformer Engine layer spec, from those of the local spec that models here are built with.

The two differ in where a norm lives (before a linear layer it is a part of it), and in that the experts of a rank are one module of several
weights. A distributed checkpoint (``torch_dist``) calls experts alike in both, so that only the norms differ there: `fused_norms`. Source:
megatron-core's ``gpt_layer_specs.py`` and ``extensions/transformer_engine.py``.
"""

from __future__ import annotations

import re

from mswift.families.base import MegatronDescription

BOTH_FORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
"""Every (norm of its own, norm inside a linear layer) that some spec has."""


def fused_norms(description: MegatronDescription, layer: int) -> dict[str, str]:
    """The norms of a layer, counted from 0, that the Transformer Engine spec has inside a linear layer: prefix here -> prefix there.

    A norm stays by itself where more than one module reads it (routers beside experts, narrow layers, attention beside its MLP).
    """
    found: dict[str, str] = {}
    norms = dict(BOTH_FORMS[2:])
    if description.attention.latent is not None and not description.is_recurrent(layer):
        names = ["self_attention.kv_layernorm.", *(["self_attention.q_layernorm."] if description.attention.latent.q_rank else [])]
        found |= {name: norms[name] for name in names}
    if not description.pre_norms or description.parallel:
        return found
    if description.is_recurrent(layer):
        found["input_layernorm."] = "self_attention.in_proj.layer_norm_"
    elif description.attention.latent is None:
        found["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not description.is_mixture(layer):
        found["pre_mlp_layernorm."] = norms["pre_mlp_layernorm."]
    return found


def te_name(name: str, description: MegatronDescription) -> str:
    """The name that the Transformer Engine spec gives to a parameter of the whole model; experts are numbered over all ranks in both."""
    match = re.fullmatch(r"(decoder\.layers\.|mtp\.layers\.)(\d+)\.(transformer_layer\.)?(.+)", name)
    if match is None:
        return name
    further = description.transformer["num_layers"] if match[3] else 0
    rest = match[4]
    for own, fused in fused_norms(description, int(match[2]) + further).items():
        if rest.startswith(own):
            rest = fused + rest.removeprefix(own)
    rest = re.sub(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$", r"experts.\2.\3\1", rest)
    return f"{match[1]}{match[2]}.{match[3] or ''}{rest}"
