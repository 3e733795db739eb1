"""Llama 4: variants that are refused, and which tokens a chunk shows."""

from __future__ import annotations

import pytest

from mswift.errors import ModelError
from tests.parity.cases import options_of
from tests.tiny import config_of
from tests.unit.families.test_unknown_fields import family_of


def test_more_than_one_expert_a_token_is_refused() -> None:
    kind, changes = options_of("llama4_text/plain")
    with pytest.raises(ModelError, match="num_experts_per_tok is 2, wanted 1 for llama4_text: megatron-core weighs the input of one expert only"):
        family_of(kind).describe(config_of(kind, **{**changes, "num_experts_per_tok": 2}))
