"""OLMoE: a mixture of experts in every layer, norms over all query and key heads together."""

from __future__ import annotations

from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, rotations
from mswift.families.mixtures import mixture_fields


def describe(hf: HfConfig) -> MegatronDescription:
    if hf.clip_qkv is not None:
        raise ModelError(f"clip_qkv is {hf.clip_qkv}, wanted null: clipped queries, keys and values are not supported")
    bias = bool(hf.attention_bias)
    sizes = {"experts": hf.num_experts, "topk": hf.num_experts_per_tok, "ffn_size": hf.intermediate_size}
    mixture = mixture_fields(hf, **sizes, normalised=bool(hf.norm_topk_prob))
    return describe_decoder(hf, attention=rotations(hf, head_norm="full"), transformer={**mixture, "add_qkv_bias": bias}, output_bias=bias)


OLMOE = decoder_family("olmoe", ("OlmoeForCausalLM",), describe, limits="clip_qkv")
