"""Phi-3.5-MoE: centred norms with biases, and two experts for each token, each weighed among those whose scores are near its own.

Training here routes as evaluation does: transformers draws the experts at random while it trains (SparseMixer-2) and jitters the router's
input; neither is done here, and the gradients are those of the routing that evaluation has.
"""

from __future__ import annotations

from dataclasses import replace

from mswift.errors import ModelError
from mswift.families.base import AttentionStyle, HfConfig, MegatronDescription, NormStyle, RouterStyle
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations, windows
from mswift.families.mixtures import ExpertNames, mixture_fields


def describe(hf: HfConfig) -> MegatronDescription:
    if hf.num_experts_per_tok != 2:
        raise ModelError(f"num_experts_per_tok is {hf.num_experts_per_tok}, wanted 2: the router of phimoe always chooses two experts")
    bias = bool(hf.attention_bias)
    mixture = mixture_fields(hf, experts=hf.num_local_experts, topk=2, ffn_size=hf.intermediate_size)
    attention, limit = _rotation(hf)
    description = describe_decoder(
        hf,
        attention=attention,
        transformer={**mixture, **windows(hf), "add_qkv_bias": bias},
        norm=NormStyle("layer", bias=True),
        output_bias=bias,
        head_bias=bool(hf.lm_head_bias),
        router=RouterStyle("sparsemixer", jitter=float(hf.router_jitter_noise)),
    )
    return replace(description, max_sequence_length=limit)


def _rotation(hf: HfConfig) -> tuple[AttentionStyle, int]:
    """The rotation, and the length up to which transformers and the model's own code agree on it.

    Raises:
        ModelError: another rotary type than longrope.
    """
    parameters = hf.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return rotations(hf), hf.max_position_embeddings
    if kind != "longrope":
        raise ModelError(f"rotary type {kind!r} is not supported in phimoe; wanted default or longrope")
    # transformers keeps the short frequencies for long texts, the model's own code takes the long ones: within this length all agree
    limit = int(parameters["original_max_position_embeddings"])
    attention = rotations(hf)
    short = tuple(replace(each, factor=float(parameters["short_mscale"]), limit=None) for each in attention.rotations)
    return replace(attention, rotations=short), limit


EXPERTS = ExpertNames(router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate_up=("w1", "w3"), down="w2", router_module="mlp.router")
LIMITS = "other than two experts a token; other rotary types than default and longrope, texts beyond its short length; jitter, sampling"
PHIMOE = decoder_family("phimoe", ("PhimoeForCausalLM",), describe, TensorNames(experts=EXPERTS), limits=LIMITS)
