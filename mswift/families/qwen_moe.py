"""Qwen2-MoE (with a gated shared expert) and Qwen3-MoE (without): a mixture in all layers but those that the config takes out."""

from __future__ import annotations

from typing import Any

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, rotations, windows
from mswift.families.mixtures import mixture_fields, sparse_layers


def describe_qwen2_moe(hf: HfConfig) -> MegatronDescription:
    shared = {"moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size, "moe_shared_expert_gate": True}
    return describe_decoder(hf, transformer={**_mixture(hf), **shared, "add_qkv_bias": bool(hf.qkv_bias), **windows(hf)})


def describe_qwen3_moe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    transformer = {**_mixture(hf), "add_qkv_bias": bias, **windows(hf)}
    return describe_decoder(hf, attention=rotations(hf, head_norm="shared"), transformer=transformer, output_bias=bias)


def _mixture(hf: HfConfig) -> dict[str, Any]:
    sizes = {"experts": hf.num_experts, "topk": hf.num_experts_per_tok, "ffn_size": hf.moe_intermediate_size}
    return mixture_fields(hf, **sizes, layers=sparse_layers(hf), normalised=bool(hf.norm_topk_prob))


QWEN2_MOE = decoder_family("qwen2_moe", ("Qwen2MoeForCausalLM",), describe_qwen2_moe)
QWEN3_MOE = decoder_family("qwen3_moe", ("Qwen3MoeForCausalLM",), describe_qwen3_moe)
