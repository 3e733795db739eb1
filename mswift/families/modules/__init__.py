"""Modules of ours that go into megatron-core's layer specs: what its own local ones lack, never a change to them."""

from __future__ import annotations

from mswift.families.modules.attention import DecoderAttention, SdpaAttention
from mswift.families.modules.causal_lm import CausalLM
from mswift.families.modules.context import SharedSequence
from mswift.families.modules.delta_net import DeltaNet
from mswift.families.modules.dispatch import mixture_layer
from mswift.families.modules.experts import GroupedExperts
from mswift.families.modules.latent import LatentAttention
from mswift.families.modules.layers import AddToResidual, BiasedColumnParallelLinear, BiasedRowParallelLinear, ParallelBlock
from mswift.families.modules.mixture import BiasedExpertRowLinear, SharedExperts, StyledRouter
from mswift.families.modules.mlp import GatedMLP, gated_mlp
from mswift.families.modules.norms import HeadNorm, Norm
from mswift.families.modules.packed import packed_rows
from mswift.families.modules.rotary import RotaryTables
from mswift.families.modules.routers import GroupedRouter

__all__ = [
    "AddToResidual",
    "BiasedColumnParallelLinear",
    "BiasedExpertRowLinear",
    "BiasedRowParallelLinear",
    "CausalLM",
    "DecoderAttention",
    "DeltaNet",
    "GatedMLP",
    "GroupedExperts",
    "GroupedRouter",
    "HeadNorm",
    "LatentAttention",
    "Norm",
    "ParallelBlock",
    "RotaryTables",
    "SdpaAttention",
    "SharedExperts",
    "SharedSequence",
    "StyledRouter",
    "gated_mlp",
    "mixture_layer",
    "packed_rows",
]
