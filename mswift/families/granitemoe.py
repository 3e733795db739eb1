"""Granite 3 with experts: Granite's factors, and a mixture in every layer whose experts a checkpoint holds in two tensors."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder
from mswift.families.granite import factors
from mswift.families.mixtures import ExpertNames, mixture_fields


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    mixture = mixture_fields(hf, experts=hf.num_local_experts, topk=hf.num_experts_per_tok, ffn_size=hf.intermediate_size)
    transformer = {**mixture, "add_qkv_bias": bias, "softmax_scale": hf.attention_multiplier}
    return describe_decoder(hf, transformer=transformer, output_bias=bias, **factors(hf))


STACKS = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
EXPERTS = ExpertNames(
    router="block_sparse_moe.router.layer", stacks=STACKS, router_module="block_sparse_moe.router", experts_module="block_sparse_moe.experts"
)
GRANITEMOE = decoder_family("granitemoe", ("GraniteMoeForCausalLM",), describe, TensorNames(experts=EXPERTS))
