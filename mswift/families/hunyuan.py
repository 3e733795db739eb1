"""Hunyuan V1, dense and with experts: norms of queries and keys after the rotation, and an expert of all tokens beside the routed ones."""

from __future__ import annotations

from typing import Any

from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations
from mswift.families.mixtures import ExpertNames, mixture_fields


def describe_dense(hf: HfConfig) -> MegatronDescription:
    return _describe(hf, {})


def describe_moe(hf: HfConfig) -> MegatronDescription:
    experts, topk = (_one_for_all(hf, name) for name in ("num_experts", "moe_topk"))
    mixture = mixture_fields(hf, experts=experts, topk=topk, ffn_size=hf.intermediate_size)
    return _describe(hf, {**mixture, "moe_shared_expert_intermediate_size": hf.intermediate_size})


def _describe(hf: HfConfig, transformer: dict[str, Any]) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    attention = rotations(hf, head_norm="shared", norm_last=True)
    return describe_decoder(hf, attention=attention, transformer={**transformer, "add_qkv_bias": bias}, output_bias=bias)


def _one_for_all(hf: HfConfig, name: str) -> int:
    """A field that may be a number or a list with one for each layer.

    Raises:
        ModelError: layers differ.
    """
    value = getattr(hf, name)
    different = set(value) if isinstance(value, list) else {value}
    if len(different) > 1:
        raise ModelError(f"{name} is {value}, wanted one number for all layers: layers that differ in it are not supported")
    return int(different.pop())


HEAD_NORMS = ("self_attn.query_layernorm", "self_attn.key_layernorm")
HUNYUAN_DENSE = decoder_family("hunyuan_v1_dense", ("HunYuanDenseV1ForCausalLM",), describe_dense, TensorNames(head_norms=HEAD_NORMS))
HUNYUAN_MOE = decoder_family(
    "hunyuan_v1_moe",
    ("HunYuanMoEV1ForCausalLM",),
    describe_moe,
    TensorNames(head_norms=HEAD_NORMS, experts=ExpertNames(router="mlp.gate.wg", shared="mlp.shared_mlp")),
    limits="num_experts or moe_topk that differ between layers",
)
