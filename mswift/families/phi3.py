"""Phi-3, Phi-3.5 and Phi-4 (mini): one tensor for queries, keys and values, one for gate and up; partial rotation, longrope, windows."""

from __future__ import annotations

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import TensorNames, decoder_family, describe_decoder, windows


def describe(hf: HfConfig) -> MegatronDescription:
    return describe_decoder(hf, transformer=windows(hf))


NAMES = TensorNames(qkv=("self_attn.qkv_proj",) * 3, gate_up=("mlp.gate_up_proj",) * 2)
PHI3 = decoder_family("phi3", ("Phi3ForCausalLM",), describe, NAMES)
