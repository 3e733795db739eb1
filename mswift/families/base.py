"""A family is data: how a Hugging Face config becomes a megatron one, and which tensor becomes which."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mswift.conversion.rules import AnyRule
from mswift.errors import ModelError

HfConfig = Any
"""A transformers PretrainedConfig."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Sizes that a tensor-parallel layout rounds up; what is added is zero, stays zero in training and is cut off on export.

    A query group of zeros is exact: its values are zero, so its output is, and so are the gradients of all that it touches.

    Args:
        vocab: rows of the embedding and the head. groups: query groups (key and value heads), each with its query heads.
    """

    vocab: int
    groups: int


@dataclass(frozen=True)
class MegatronDescription:
    """What megatron-core has to be told to build one model.

    Args:
        transformer: fields of TransformerConfig. vocab_size: without padding. max_sequence_length: in tokens.
        tied: the output head is the embedding. inv_freq: fp32 ``[rotary dim / 2]``.
        output_bias: attention's output projection has a bias. mlp_bias: both MLP layers have one.
    """

    transformer: dict[str, Any]
    vocab_size: int
    max_sequence_length: int
    tied: bool
    inv_freq: torch.Tensor = field(repr=False)
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def heads_per_group(self) -> int:
        return self.transformer["num_attention_heads"] // self.transformer["num_query_groups"]

    def padding(self, tp: int) -> Padding:
        """The sizes that `tp` ranks can share evenly: a multiple of 8 tokens on each, and whole query groups or whole shares of one."""
        multiple = 8 * tp
        groups, heads = self.transformer["num_query_groups"], self.transformer["num_attention_heads"]
        even = heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)
        return Padding(
            vocab=-(-self.vocab_size // multiple) * multiple,
            groups=groups if even else -(-groups // tp) * tp,
        )


@dataclass(frozen=True)
class ModelFamily:
    """One architecture family.

    Args:
        name: short name, such as ``qwen2``. architectures: values of ``architectures`` in config.json.
        describe: Hugging Face config -> megatron description; raises ModelError for what it cannot express exactly.
        rules: (Hugging Face config, padding of the layout) -> one rule for every tensor.
    """

    name: str
    architectures: tuple[str, ...]
    describe: Callable[[HfConfig], MegatronDescription]
    rules: Callable[[HfConfig, Padding], tuple[AnyRule, ...]]


_FAMILIES: dict[str, ModelFamily] = {}


def register(family: ModelFamily) -> ModelFamily:
    for architecture in family.architectures:
        _FAMILIES[architecture] = family
    return family


def families() -> tuple[ModelFamily, ...]:
    """Every registered family, by name."""
    return tuple(sorted(set(_FAMILIES.values()), key=lambda family: family.name))


def find_family(architectures: list[str] | None, where: str) -> ModelFamily:
    """The family of a checkpoint.

    Raises:
        ModelError: none fits; the nearest supported architecture is named.
    """
    names = architectures or []
    for name in names:
        if name in _FAMILIES:
            return _FAMILIES[name]
    known = sorted(_FAMILIES)
    got = ", ".join(names) or "none in config.json"
    nearest = difflib.get_close_matches(names[0] if names else "", known, n=1, cutoff=0.0)
    raise ModelError(f"{where}: architecture {got} is not supported; nearest supported: {nearest[0]}; all: {', '.join(known)}")
