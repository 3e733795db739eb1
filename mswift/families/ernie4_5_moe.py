"""ERNIE 4.5 with experts: a bias that only chooses on softmax scores, experts of all tokens, mixtures in an interval of the layers."""

from __future__ import annotations

from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription, RouterStyle
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations
from mswift.families.mixtures import ExpertNames, mixture_fields


def describe(hf: HfConfig) -> MegatronDescription:
    first, last, step = hf.moe_layer_start_index, hf.moe_layer_end_index, hf.moe_layer_interval
    layers = [int((layer + 1) % step == 0 and first <= layer <= last) for layer in range(hf.num_hidden_layers)]
    bias = bool(hf.use_bias)
    if bias and hf.moe_num_shared_experts:
        raise ModelError("use_bias is true with shared experts in ernie4_5_moe: megatron-core's have no biases; this is not supported")
    transformer = {
        **mixture_fields(hf, experts=hf.moe_num_experts, topk=hf.moe_k, ffn_size=hf.moe_intermediate_size, layers=layers, normalised=False),
        "add_qkv_bias": bias,
        "attention_dropout": 0.0,
    }
    if hf.moe_num_shared_experts:
        transformer["moe_shared_expert_intermediate_size"] = hf.moe_intermediate_size * hf.moe_num_shared_experts
    return describe_decoder(
        hf,
        attention=rotations(hf, interleaved=True),
        transformer=transformer,
        output_bias=bias,
        mlp_bias=bias,
        head_bias=bias,
        router=RouterStyle("corrected_softmax", wide=True, floor=float(hf.moe_norm_min)),
    )


EXPERTS = ExpertNames(bias="mlp.moe_statics.e_score_correction_bias", bias_has_rows=True, shared="mlp.shared_experts")
NAMES = TensorNames(experts=EXPERTS)
ERNIE4_5_MOE = decoder_family("ernie4_5_moe", ("Ernie4_5_MoeForCausalLM",), describe, NAMES, limits="use_bias with shared experts")
