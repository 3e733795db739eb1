"""Llama 2 and 3, SmolLM2, Yi, DeepSeek-R1-Distill-Llama, InternLM3: grouped queries, no norm on them; biases by two config fields."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder


def describe(hf: HfConfig) -> MegatronDescription:
    bias = hf.attention_bias
    return describe_decoder(hf, transformer={"add_qkv_bias": bias}, output_bias=bias, mlp_bias=hf.mlp_bias)


LLAMA = decoder_family("llama", ("LlamaForCausalLM", "InternLM3ForCausalLM"), describe)
