"""Granite 3 and 4 dense: Llama with factors on the embedding, the scores, the sublayers' outputs and the logits."""

from __future__ import annotations

from typing import Any

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder


def factors(hf: HfConfig) -> dict[str, Any]:
    """Fields of the description: factors on the embedding, the sublayers' outputs and the logits."""
    return {
        "embedding_scale": float(hf.embedding_multiplier),
        "residual_scale": float(hf.residual_multiplier),
        "logit_scale": 1.0 / hf.logits_scaling,
    }


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    transformer = {"add_qkv_bias": bias, "softmax_scale": hf.attention_multiplier}
    return describe_decoder(hf, transformer=transformer, output_bias=bias, mlp_bias=bool(hf.mlp_bias), **factors(hf))


GRANITE = decoder_family("granite", ("GraniteForCausalLM",), describe)
