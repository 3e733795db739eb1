"""Mistral (7B, Nemo, Small) and Ministral: Llama without biases, with a window in all layers, or in those that ``layer_types`` names."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, windows


def describe(hf: HfConfig) -> MegatronDescription:
    return describe_decoder(hf, transformer=windows(hf))


MISTRAL = decoder_family("mistral", ("MistralForCausalLM",), describe)
MINISTRAL = decoder_family("ministral", ("MinistralForCausalLM",), describe)
