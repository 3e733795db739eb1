"""GLM-4: partial rotation of neighbouring pairs, gate and up in one tensor; the 0414 models have a norm after each sublayer as well."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import PRE_NORMS, TensorNames, decoder_family, describe_decoder, rotations


def describe_glm(hf: HfConfig) -> MegatronDescription:
    return describe_decoder(hf, attention=rotations(hf, interleaved=True), transformer={"add_qkv_bias": bool(hf.attention_bias)})


def describe_glm4(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    return describe_decoder(hf, attention=rotations(hf, interleaved=True), transformer={"add_qkv_bias": bias}, post_norms=True)


GATE_UP = ("mlp.gate_up_proj",) * 2
POST_NORMS = {"self_attn_bda.norm": "post_self_attn_layernorm", "mlp_bda.norm": "post_mlp_layernorm"}
GLM = decoder_family("glm", ("GlmForCausalLM",), describe_glm, TensorNames(gate_up=GATE_UP))
GLM4 = decoder_family("glm4", ("Glm4ForCausalLM",), describe_glm4, TensorNames(gate_up=GATE_UP, norms={**PRE_NORMS, **POST_NORMS}))
