"""MiniMax-M2: sigmoid routers without groups, no shared expert, norms over all query and key heads together, partial rotation."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations
from mswift.families.mixtures import ExpertNames, mixture_fields, sigmoid_router


def describe(hf: HfConfig) -> MegatronDescription:
    mixture = mixture_fields(hf, experts=hf.num_local_experts, topk=hf.num_experts_per_tok, ffn_size=hf.intermediate_size)
    return describe_decoder(hf, attention=rotations(hf, head_norm="full"), transformer={**mixture, **sigmoid_router()})


EXPERTS = ExpertNames(
    router="block_sparse_moe.gate",
    bias="block_sparse_moe.e_score_correction_bias",
    experts="block_sparse_moe.experts",
    gate_up=("w1", "w3"),
    down="w2",
    router_module="mlp.gate",
)
MINIMAX_M2 = decoder_family("minimax_m2", ("MiniMaxM2ForCausalLM",), describe, TensorNames(experts=EXPERTS))
