"""StarCoder2: centred norms with biases, biases on all linears by one config field, an MLP without a gate, a window in all layers."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription, NormStyle
from mswift.families.common import TensorNames, decoder_family, describe_decoder, windows


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.use_bias)
    return describe_decoder(
        hf,
        activations=("gelu_pytorch_tanh", "gelu"),
        transformer={"add_qkv_bias": bias, "gated_linear_unit": False, **windows(hf)},
        norm=NormStyle("layer", bias=True),
        output_bias=bias,
        mlp_bias=bias,
    )


STARCODER2 = decoder_family("starcoder2", ("Starcoder2ForCausalLM",), describe, TensorNames(up="mlp.c_fc", down="mlp.c_proj"))
