"""Command R, R+ and Aya (cohere), Command R7B and A (cohere2): attention and MLP side by side, centred norms, neighbouring pairs rotated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mswift.families.base import AttentionStyle, HfConfig, MegatronDescription, NormStyle
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations, windows

NORM = NormStyle("layer")


def describe_cohere(hf: HfConfig) -> MegatronDescription:
    return _describe(hf, rotations(hf, interleaved=True, norm=NORM, head_norm="own" if hf.use_qk_norm else None), {})


def describe_cohere2(hf: HfConfig) -> MegatronDescription:
    """Windowed layers are rotated, full ones are not."""
    style = rotations(hf, interleaved=True, norm=NORM)
    places = tuple(0 if kind == "sliding_attention" else None for kind in hf.layer_types)
    return _describe(hf, replace(style, rotation_of_layer=places), windows(hf))


def _describe(hf: HfConfig, attention: AttentionStyle, window: dict[str, Any]) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    return describe_decoder(
        hf,
        attention=attention,
        transformer={"add_qkv_bias": bias, **window},
        norm=NORM,
        output_bias=bias,
        parallel=True,
        logit_scale=float(hf.logit_scale),
    )


NAMES = TensorNames(norms={"input_layernorm": "input_layernorm"})
COHERE = decoder_family("cohere", ("CohereForCausalLM",), describe_cohere, NAMES)
COHERE2 = decoder_family("cohere2", ("Cohere2ForCausalLM",), describe_cohere2, NAMES)
