"""Seed-OSS: Llama with separate config fields for the biases of queries, keys and values, of the output, and of the MLP."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder


def describe(hf: HfConfig) -> MegatronDescription:
    transformer = {"add_qkv_bias": bool(hf.attention_bias)}
    return describe_decoder(hf, transformer=transformer, output_bias=bool(hf.attention_out_bias), mlp_bias=bool(hf.mlp_bias))


SEED_OSS = decoder_family("seed_oss", ("SeedOssForCausalLM",), describe)
