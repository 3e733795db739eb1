"""Qwen3-Next and Qwen3.5 (text): three gated delta nets for every attention, which has gates of its own; norms stored around zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mswift.conversion.file_forms import TOWER
from mswift.conversion.rules import Drop
from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription, NormStyle
from mswift.families.common import FURTHER_LAYERS, FurtherNames, TensorNames, decoder_family, describe_decoder, field_of, rotations
from mswift.families.delta_nets import delta_fields
from mswift.families.mixtures import mixture_fields, sparse_layers

NORM = NormStyle(zero_centred=True)
MTP = (Drop(r"mtp\..+", FURTHER_LAYERS, told=True),)
FURTHER = FurtherNames("mtp.layers.{index}.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm", "mtp.fc", copies=None)
"""Several layers would share all but their blocks, which megatron-core's do not; such a checkpoint's are carried along as they are."""
KINDS = ("linear_attention", "full_attention")


def _describe(hf: HfConfig, **transformer: Any) -> MegatronDescription:
    other = sorted(set(hf.layer_types) - set(KINDS))
    if other:
        raise ModelError(f"layer_types has {other[0]!r}, wanted {' or '.join(KINDS)} for {hf.model_type}; this variant is not supported")
    if not field_of(hf, "attn_output_gate", default=True):
        raise ModelError(f"attn_output_gate is false: attention without gates is not known to transformers for {hf.model_type}; it is not supported")
    if field_of(hf, "mamba_ssm_dtype", default="float32") != "float32":
        raise ModelError(f"mamba_ssm_dtype is {hf.mamba_ssm_dtype!r}, wanted 'float32': the states of delta nets are held in nothing else here")
    bias = bool(hf.attention_bias)
    description = describe_decoder(
        hf,
        attention=rotations(hf, head_norm="shared", norm=NORM),
        transformer={**delta_fields(hf), "attention_output_gate": True, "add_qkv_bias": bias, **transformer},
        norm=NORM,
        output_bias=bias,
    )
    return replace(description, further_layers=field_of(hf, "mtp_num_hidden_layers", "num_nextn_predict_layers", default=1))


def describe_next(hf: HfConfig) -> MegatronDescription:
    return _describe(hf, **(_mixture(hf, sparse_layers(hf), bool(hf.norm_topk_prob)) if hf.num_experts else {}))


def describe_dense(hf: HfConfig) -> MegatronDescription:
    return _describe(hf)


def describe_moe(hf: HfConfig) -> MegatronDescription:
    if field_of(hf, "mlp_only_layers"):
        raise ModelError(f"mlp_only_layers is {hf.mlp_only_layers}: transformers makes a mixture of every {hf.model_type} layer; set it to []")
    return _describe(hf, **_mixture(hf, None, True))


def _mixture(hf: HfConfig, layers: list[int] | None, normalised: bool) -> dict[str, Any]:
    sizes = {"experts": hf.num_experts, "topk": hf.num_experts_per_tok, "ffn_size": hf.moe_intermediate_size}
    shared = {"moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size, "moe_shared_expert_gate": True}
    return {**mixture_fields(hf, **sizes, layers=layers, normalised=normalised), **shared}


NOT_YET = "context parallelism; several layers that predict further ahead (carried along, not built)"
TEXT_ONLY = f"{NOT_YET}; the vision tower (carried along, not built)"
PACKED = TensorNames(delta_inputs="packed", dropped=MTP, further=FURTHER)
SEPARATE = TensorNames(delta_inputs="separate", dropped=(*MTP, TOWER), further=FURTHER)
QWEN3_NEXT = decoder_family("qwen3_next", ("Qwen3NextForCausalLM",), describe_next, PACKED, limits=NOT_YET)
QWEN3_5 = decoder_family(
    "qwen3_5_text", ("Qwen3_5ForCausalLM",), describe_dense, SEPARATE, limits=TEXT_ONLY, holders=("Qwen3_5ForConditionalGeneration",)
)
QWEN3_5_MOE = decoder_family(
    "qwen3_5_moe_text",
    ("Qwen3_5MoeForCausalLM",),
    describe_moe,
    SEPARATE,
    limits=f"{TEXT_ONLY}; mlp_only_layers",
    holders=("Qwen3_5MoeForConditionalGeneration",),
)
