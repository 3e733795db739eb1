"""Llama 4 (text): layers with a rotation see chunks, layers without one see all; every so many layers a mixture that weighs its input."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mswift.conversion.file_forms import TOWER
from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations
from mswift.families.mixtures import ExpertNames, mixture_fields

if TYPE_CHECKING:
    import torch


def describe(hf: HfConfig) -> MegatronDescription:
    if hf.num_experts_per_tok != 1:
        raise ModelError(
            f"num_experts_per_tok is {hf.num_experts_per_tok}, wanted 1 for {hf.model_type}: megatron-core weighs the input of one expert only; "
            "this variant is not supported"
        )
    layers, rotated = range(hf.num_hidden_layers), [bool(flag) for flag in hf.no_rope_layers]
    floor, scale, chunk, bias = hf.floor_scale, hf.attn_scale, hf.attention_chunk_size, bool(hf.attention_bias)

    def query_factor(positions: torch.Tensor) -> torch.Tensor:
        return 1.0 + scale * ((positions + 1.0) / floor).floor().log1p()

    attention = rotations(
        hf,
        interleaved=True,
        head_norm="rotated" if hf.use_qk_norm else None,
        query_factor=query_factor if hf.attn_temperature_tuning else None,
        factor_of_layer=tuple(not rotated[layer] for layer in layers),
        chunk_of_layer=tuple(chunk if kind == "chunked_attention" else None for kind in hf.layer_types),
    )
    sparse = [int(layer in hf.moe_layers) for layer in layers]
    mixture = mixture_fields(hf, experts=hf.num_local_experts, topk=1, ffn_size=hf.intermediate_size, layers=sparse, normalised=False)
    sigmoid = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False, "moe_apply_probs_on_input": True}
    shared = {"moe_shared_expert_intermediate_size": hf.intermediate_size}
    return describe_decoder(
        hf,
        attention=replace(attention, rotation_of_layer=tuple(0 if rotated[layer] else None for layer in layers)),
        transformer={**mixture, **sigmoid, **shared, "ffn_hidden_size": hf.intermediate_size_mlp, "add_qkv_bias": bias},
        output_bias=bias,
    )


EXPERTS = ExpertNames(
    router="feed_forward.router",
    stacks=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    transposed=True,
    shared="feed_forward.shared_expert",
    experts_module="feed_forward.experts",
)
NAMES = TensorNames(gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"), down="feed_forward.down_proj", experts=EXPERTS, dropped=(TOWER,))
LLAMA4 = decoder_family(
    "llama4_text",
    ("Llama4ForCausalLM",),
    describe,
    NAMES,
    limits="more than one expert a token; the vision tower (carried along, not built)",
    holders=("Llama4ForConditionalGeneration",),
)
