"""Gemma 1, 2 and 3 (text): norms stored around zero, a scaled embedding; from 2 on norms on both sides of a sublayer, windows and limits."""

from __future__ import annotations

from typing import Any

from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription, NormStyle
from mswift.families.common import TensorNames, decoder_family, describe_decoder, field_of, rotations, windows

NORM = NormStyle(zero_centred=True)
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")


def _describe(hf: HfConfig, attention: dict[str, Any], transformer: dict[str, Any], **rest: Any) -> MegatronDescription:
    if field_of(hf, "use_bidirectional_attention"):
        raise ModelError(f"use_bidirectional_attention is set: this {hf.model_type} model looks ahead and is not a causal one; it is not supported")
    bias = bool(hf.attention_bias)
    return describe_decoder(
        hf,
        attention=rotations(hf, norm=NORM, **attention),
        activations=ACTIVATIONS,
        transformer={"add_qkv_bias": bias, **transformer},
        norm=NORM,
        output_bias=bias,
        embedding_scale=hf.hidden_size**0.5,
        **rest,
    )


def describe_gemma(hf: HfConfig) -> MegatronDescription:
    return _describe(hf, {}, {})


def describe_gemma2(hf: HfConfig) -> MegatronDescription:
    return _sandwich(hf, None)


def describe_gemma3(hf: HfConfig) -> MegatronDescription:
    return _sandwich(hf, "shared")


def _sandwich(hf: HfConfig, head_norm: str | None) -> MegatronDescription:
    transformer = {"softmax_scale": hf.query_pre_attn_scalar**-0.5, **windows(hf)}
    attention = {"head_norm": head_norm, "softcap": hf.attn_logit_softcapping}
    return _describe(hf, attention, transformer, post_norms=True, logit_softcap=hf.final_logit_softcapping)


NORMS = {
    "input_layernorm": "input_layernorm",
    "self_attn_bda.norm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "mlp_bda.norm": "post_feedforward_layernorm",
}
LOOKING = "use_bidirectional_attention"
GEMMA = decoder_family("gemma", ("GemmaForCausalLM",), describe_gemma, limits=LOOKING)
GEMMA2 = decoder_family("gemma2", ("Gemma2ForCausalLM",), describe_gemma2, TensorNames(norms=NORMS), limits=LOOKING)
GEMMA3 = decoder_family("gemma3_text", ("Gemma3ForCausalLM",), describe_gemma3, TensorNames(norms=NORMS), limits=LOOKING)
