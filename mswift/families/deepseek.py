"""DeepSeek-V3 (and Kimi-K2 and Moonlight, which are its architecture) and DeepSeek-V2: latent attention over mixtures of experts."""

from __future__ import annotations

from typing import Any

from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder
from mswift.families.latent import latent_attention, latent_fields
from mswift.families.mixtures import OTHER_ROUTERS, ExpertNames, check_fields, deepseek_choice, deepseek_mixture, deepseek_sizes, grouped_choice


def describe_v3(hf: HfConfig) -> MegatronDescription:
    return describe_decoder(
        hf,
        attention=latent_attention(hf, interleaved=bool(hf.rope_interleave)),
        transformer={**latent_fields(hf), **deepseek_mixture(hf)},
        output_bias=bool(hf.attention_bias),
        choice=deepseek_choice(hf),
    )


def describe_v2(hf: HfConfig) -> MegatronDescription:
    check_fields(hf, {"scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False, "mlp_bias": False})
    if hf.topk_method not in ("greedy", "group_limited_greedy"):
        raise ModelError(f"topk_method is {hf.topk_method!r}, wanted 'greedy' or 'group_limited_greedy'; this variant is not supported")
    limited = hf.topk_method == "group_limited_greedy"
    factor: dict[str, Any] = {"moe_router_topk_scaling_factor": float(hf.routed_scaling_factor)}
    return describe_decoder(
        hf,
        attention=latent_attention(hf, interleaved=True),
        transformer={**latent_fields(hf), **deepseek_sizes(hf), **factor},
        output_bias=bool(hf.attention_bias),
        choice=grouped_choice(hf, 1, normalised=False) if limited else None,
    )


NAMES = TensorNames(experts=ExpertNames(shared="mlp.shared_experts"))
DEEPSEEK_V3 = decoder_family("deepseek_v3", ("DeepseekV3ForCausalLM",), describe_v3, NAMES, (("kimi_k2", "deepseek_v3"),), OTHER_ROUTERS)
DEEPSEEK_V2 = decoder_family("deepseek_v2", ("DeepseekV2ForCausalLM",), describe_v2, NAMES, limits="other topk_method than (group_limited_)greedy")
