"""OLMo 2 and 3: norms on the output of the sublayers, and over all query and key heads together; 3 adds windows with their own rotation."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations, windows


def describe_olmo2(hf: HfConfig) -> MegatronDescription:
    return _describe(hf, {})


def describe_olmo3(hf: HfConfig) -> MegatronDescription:
    return _describe(hf, windows(hf))


def _describe(hf: HfConfig, window: dict[str, object]) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    return describe_decoder(
        hf,
        attention=rotations(hf, head_norm="full"),
        transformer={"add_qkv_bias": bias, **window},
        output_bias=bias,
        pre_norms=False,
        post_norms=True,
    )


NAMES = TensorNames(norms={"self_attn_bda.norm": "post_attention_layernorm", "mlp_bda.norm": "post_feedforward_layernorm"})
OLMO2 = decoder_family("olmo2", ("Olmo2ForCausalLM",), describe_olmo2, NAMES)
OLMO3 = decoder_family("olmo3", ("Olmo3ForCausalLM",), describe_olmo3, NAMES)
