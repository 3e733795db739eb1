"""Qwen3 dense: a norm on each query and key head before the rotation, head size by config, no biases unless asked for."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, rotations, windows


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    return describe_decoder(hf, attention=rotations(hf, head_norm="shared"), transformer={"add_qkv_bias": bias, **windows(hf)}, output_bias=bias)


QWEN3 = decoder_family("qwen3", ("Qwen3ForCausalLM",), describe)
