"""Ministral 3: Mistral whose queries grow with the logarithm of their position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mswift.families.base import HfConfig, MegatronDescription
from mswift.families.common import decoder_family, describe_decoder, rotations, windows

if TYPE_CHECKING:
    import torch


def describe(hf: HfConfig) -> MegatronDescription:
    beta, limit = hf.rope_parameters["llama_4_scaling_beta"], hf.rope_parameters["original_max_position_embeddings"]

    def query_factor(positions: torch.Tensor) -> torch.Tensor:
        return 1.0 + beta * (1.0 + (positions / limit).floor()).log()

    return describe_decoder(hf, attention=rotations(hf, query_factor=query_factor), transformer=windows(hf))


MINISTRAL3 = decoder_family("ministral3", ("Ministral3ForCausalLM",), describe)
