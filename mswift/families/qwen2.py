"""Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values always (no config field), and optional sliding windows."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, windows


def describe(hf: HfConfig) -> MegatronDescription:
    return describe_decoder(hf, transformer={"add_qkv_bias": True, **windows(hf)})


QWEN2 = decoder_family("qwen2", ("Qwen2ForCausalLM",), describe)
