"""Gated delta nets: the config fields of their sizes, and the rules of their tensors."""

from __future__ import annotations

from typing import Any, Literal

from mswift.conversion.rules import GroupedBlocks, Rename, Rule
from mswift.families.base import HfConfig, MegatronDescription

OURS = {"A_log": "A_log", "dt_bias": "dt_bias", "out_norm.weight": "norm.weight", "out_proj.weight": "out_proj.weight"}
"""Tensors that have one name in megatron and another here, below the module."""


def delta_fields(hf: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields of the layers that ``layer_types`` calls linear attention."""
    return {
        "linear_attention_freq": [int(kind == "linear_attention") for kind in hf.layer_types],
        "linear_conv_kernel_dim": hf.linear_conv_kernel_dim,
        "linear_key_head_dim": hf.linear_key_head_dim,
        "linear_value_head_dim": hf.linear_value_head_dim,
        "linear_num_key_heads": hf.linear_num_key_heads,
        "linear_num_value_heads": hf.linear_num_value_heads,
    }


def delta_rules(ours: str, theirs: str, description: MegatronDescription, inputs: Literal["packed", "separate"]) -> list[Rule]:
    """The rules of one delta net.

    Args:
        inputs: how the checkpoint has the input projection: ``packed``, two tensors with what belongs to a key head side by side, or
            ``separate``, ``[query; key; value]`` and one tensor each for gate, beta and alpha.
    """
    fields = description.transformer
    groups, heads = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    keys, values = fields["linear_key_head_dim"], heads // groups * fields["linear_value_head_dim"]
    qkv = (groups * keys, groups * keys, groups * values)

    def name(part: str) -> str:
        return f"{theirs}linear_attn.{part}.weight"

    if inputs == "packed":
        packed = ((name("in_proj_qkvz"), (keys, keys, values, values)), (name("in_proj_ba"), (heads // groups,) * 2))
        in_proj = GroupedBlocks(f"{ours}in_proj.weight", packed, groups)
    else:
        separate = ((name("in_proj_qkv"), qkv), (name("in_proj_z"), qkv[2:]), (name("in_proj_b"), (heads,)), (name("in_proj_a"), (heads,)))
        in_proj = GroupedBlocks(f"{ours}in_proj.weight", separate)
    conv1d = GroupedBlocks(f"{ours}conv1d.weight", ((name("conv1d"), qkv),))
    return [in_proj, conv1d, *(Rename(ours + mine, f"{theirs}linear_attn.{its}") for mine, its in OURS.items())]
