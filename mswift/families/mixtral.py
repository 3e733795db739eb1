"""Mixtral: Mistral with a mixture of experts in every layer; the weights of the chosen experts sum to one."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, windows
from mswift.families.mixtures import ExpertNames, mixture_fields


def describe(hf: HfConfig) -> MegatronDescription:
    mixture = mixture_fields(hf, experts=hf.num_local_experts, topk=hf.num_experts_per_tok, ffn_size=hf.intermediate_size)
    return describe_decoder(hf, transformer={**mixture, **windows(hf)})


EXPERTS = ExpertNames(router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate_up=("w1", "w3"), down="w2", router_module="mlp.gate")
MIXTRAL = decoder_family("mixtral", ("MixtralForCausalLM",), describe, TensorNames(experts=EXPERTS))
