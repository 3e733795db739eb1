"""GLM-4.5 to 4.7: DeepSeek's mixture with grouped queries, biases on them and, in some sizes, a norm on each head."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations
from mswift.families.mixtures import OTHER_ROUTERS, ExpertNames, deepseek_choice, deepseek_mixture


def describe(hf: HfConfig) -> MegatronDescription:
    attention = rotations(hf, head_norm="shared" if hf.use_qk_norm else None)
    transformer = {**deepseek_mixture(hf), "add_qkv_bias": bool(hf.attention_bias)}
    return describe_decoder(hf, attention=attention, transformer=transformer, choice=deepseek_choice(hf))


NAMES = TensorNames(experts=ExpertNames(shared="mlp.shared_experts"))
GLM4_MOE = decoder_family("glm4_moe", ("Glm4MoeForCausalLM",), describe, NAMES, limits=OTHER_ROUTERS)
