"""Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values always (no config field), and optional sliding windows."""

from __future__ import annotations

from mswift.conversion.rules import AnyRule
from mswift.families.base import HfConfig, MegatronDescription, ModelFamily, Padding, register
from mswift.families.common import decoder_rules, describe_decoder, sliding_window


def describe(hf: HfConfig) -> MegatronDescription:
    return describe_decoder(hf, add_qkv_bias=True, **sliding_window(hf))


def rules(hf: HfConfig, padding: Padding) -> tuple[AnyRule, ...]:
    return decoder_rules(hf, padding, qkv_bias=True)


QWEN2 = register(ModelFamily("qwen2", ("Qwen2ForCausalLM",), describe, rules))
