"""gpt-oss: attention with sinks and alternating windows, experts with biases and a clamped gate that a checkpoint holds in four tensors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from mswift.families.base import HfConfig, MegatronDescription, RouterStyle
from mswift.families.common import TensorNames, decoder_family, describe_decoder, rotations, windows
from mswift.families.mixtures import ExpertNames, mixture_fields

if TYPE_CHECKING:
    import torch


def sigmoid_gate(alpha: float, x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(alpha * x)``, of any shape."""
    return x * (x * alpha).sigmoid()


def describe(hf: HfConfig) -> MegatronDescription:
    bias = bool(hf.attention_bias)
    transformer = {
        **mixture_fields(hf, experts=hf.num_local_experts, topk=hf.num_experts_per_tok, ffn_size=hf.intermediate_size),
        **windows(hf),
        "add_qkv_bias": bias,
        "activation_func": functools.partial(sigmoid_gate, float(hf.swiglu_alpha)),
        "activation_func_clamp_value": float(hf.swiglu_limit),
        "glu_linear_offset": 1.0,
    }
    return describe_decoder(
        hf,
        attention=rotations(hf, sinks=True),
        transformer=transformer,
        output_bias=bias,
        expert_bias=True,
        router=RouterStyle(bias=True),
    )


EXPERTS = ExpertNames(router="mlp.router", stacks=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), transposed=True, woven=True, declared=True)
GPT_OSS = decoder_family("gpt_oss", ("GptOssForCausalLM",), describe, TensorNames(experts=EXPERTS))
