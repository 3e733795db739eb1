"""ERNIE 4.5 dense: Llama with neighbouring pairs rotated and biases on all linears by one config field."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, rotations


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.use_bias)
    transformer = {"add_qkv_bias": bias, "attention_dropout": 0.0}
    return describe_decoder(hf, attention=rotations(hf, interleaved=True), transformer=transformer, output_bias=bias, mlp_bias=bias)


ERNIE4_5 = decoder_family("ernie4_5", ("Ernie4_5ForCausalLM",), describe)
