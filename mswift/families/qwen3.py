"""Qwen3 dense: a norm on each query and key head before the rotation, head size by config, no biases unless asked for."""

from __future__ import annotations

from mswift.conversion.rules import AnyRule
from mswift.families.base import HfConfig, MegatronDescription, ModelFamily, Padding, register
from mswift.families.common import decoder_rules, describe_decoder, sliding_window


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    return describe_decoder(hf, qk_layernorm=True, add_qkv_bias=bias, output_bias=bias, **sliding_window(hf))


def rules(hf: HfConfig, padding: Padding) -> tuple[AnyRule, ...]:
    bias = bool(hf.attention_bias)
    return decoder_rules(hf, padding, qkv_bias=bias, output_bias=bias, qk_norm=True)


QWEN3 = register(ModelFamily("qwen3", ("Qwen3ForCausalLM",), describe, rules))
