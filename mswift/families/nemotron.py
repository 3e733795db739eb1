"""Nemotron and Minitron: centred norms stored around zero with biases, squared ReLU without a gate, partial rotation."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription, NormStyle
from mswift.families.common import decoder_family, describe_decoder


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    return describe_decoder(
        hf,
        activations=("relu2",),
        transformer={"add_qkv_bias": bias, "gated_linear_unit": False},
        norm=NormStyle("layer", zero_centred=True, bias=True),
        output_bias=bias,
        mlp_bias=bool(hf.mlp_bias),
    )


NEMOTRON = decoder_family("nemotron", ("NemotronForCausalLM",), describe)
