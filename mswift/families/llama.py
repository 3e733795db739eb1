"""Llama 2 and 3, SmolLM2, Yi, DeepSeek-R1-Distill-Llama: grouped queries, no norm on them; biases by two config fields."""

from __future__ import annotations

from mswift.conversion.rules import AnyRule
from mswift.families.base import HfConfig, MegatronDescription, ModelFamily, Padding, register
from mswift.families.common import decoder_rules, describe_decoder


def describe(hf: HfConfig) -> MegatronDescription:
    return describe_decoder(hf, add_qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)


def rules(hf: HfConfig, padding: Padding) -> tuple[AnyRule, ...]:
    return decoder_rules(hf, padding, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)


LLAMA = register(ModelFamily("llama", ("LlamaForCausalLM",), describe, rules))
