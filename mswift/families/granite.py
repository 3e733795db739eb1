"""Granite 3 and 4 dense: Llama with factors on the embedding, the scores, the sublayers' outputs and the logits."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    return describe_decoder(
        hf,
        transformer={"add_qkv_bias": bias, "softmax_scale": hf.attention_multiplier},
        output_bias=bias,
        mlp_bias=bool(hf.mlp_bias),
        embedding_scale=float(hf.embedding_multiplier),
        residual_scale=float(hf.residual_multiplier),
        logit_scale=1.0 / hf.logits_scaling,
    )


GRANITE = decoder_family("granite", ("GraniteForCausalLM",), describe)
