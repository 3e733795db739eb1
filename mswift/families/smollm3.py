"""SmolLM3: Llama in which every fourth layer has no rotary positions."""

from __future__ import annotations

from dataclasses import replace

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, rotations, windows


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    attention = replace(rotations(hf), rotation_of_layer=tuple(0 if rotated else None for rotated in hf.no_rope_layers))
    return describe_decoder(hf, attention=attention, transformer={"add_qkv_bias": bias, **windows(hf)}, output_bias=bias, mlp_bias=bool(hf.mlp_bias))


SMOLLM3 = decoder_family("smollm3", ("SmolLM3ForCausalLM",), describe)
