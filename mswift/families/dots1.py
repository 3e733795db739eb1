"""dots.llm1: DeepSeek's mixture with the attention of Qwen3, and windows in the layers that ``layer_types`` names."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations, windows
from mswift.families.mixtures import OTHER_ROUTERS, ExpertNames, deepseek_choice, deepseek_mixture


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    transformer = {**deepseek_mixture(hf), "add_qkv_bias": bias, **windows(hf)}
    attention = rotations(hf, head_norm="shared")
    return describe_decoder(hf, attention=attention, transformer=transformer, output_bias=bias, choice=deepseek_choice(hf))


NAMES = TensorNames(experts=ExpertNames(shared="mlp.shared_experts"))
DOTS1 = decoder_family("dots1", ("Dots1ForCausalLM",), describe, NAMES, limits=OTHER_ROUTERS)
