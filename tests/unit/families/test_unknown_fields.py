"""Entries of a config.json that change a model and are not read by its family."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mswift.errors import ModelError
from mswift.families import families
from mswift.families.fields import describe_checked, unknown_fields
from tests.parity.cases import every_case, options_of
from tests.tiny import config_of


def family_of(name: str) -> Any:
    return next(family for family in families() if family.name == name)


@pytest.mark.parametrize("case", every_case())
def test_all_that_a_family_has_is_known(case: str) -> None:
    """Whatever transformers writes of a config of ours, with every default."""
    name, changes = options_of(case)
    config = config_of(name, **changes)
    raw = json.loads(config.to_json_string(use_diff=False))
    assert unknown_fields(raw, config, family_of(name).describe) == {}


def test_what_is_read_is_not_unknown_and_the_rest_is() -> None:
    config = config_of("llama")
    raw = json.loads(config.to_json_string(use_diff=False))
    describe = family_of("llama").describe
    harmless = {
        "rope_scaling": {"factor": 2.0},
        "_note": "x",
        "image_token_id": 7,
        "use_cache": False,
        "resid_pdrop": 0.1,
        "new_thing": None,
        "no_layers": [],
        "quantization_config": {"quant_method": "fp8"},
    }
    assert unknown_fields({**raw, **harmless}, config, describe) == {}
    changed = {"attn_logit_softcapping": 50.0, "qk_norm": True, "rope_interleaved": True, "hidden_size": 72}
    assert unknown_fields({**raw, **changed}, config, describe) == {key: value for key, value in changed.items() if key != "hidden_size"}
    with pytest.raises(ModelError, match=r"^here: 1 field\(s\) that may change .* \(qk_norm = true\); --allow_unknown_config true goes on"):
        describe_checked(family_of("llama"), {**raw, "qk_norm": True}, config, "here")
    description = describe_checked(family_of("llama"), {**raw, "qk_norm": True}, config, "here", allow_unknown=True)
    assert description.transformer["hidden_size"] == 72


def test_a_config_of_another_family_is_refused() -> None:
    raw = {"architectures": ["Qwen2MoeForCausalLM"]}
    with pytest.raises(ModelError, match=r"^here: architectures Qwen2MoeForCausalLM and model_type llama are of different families \(.*; mend it$"):
        describe_checked(family_of("qwen2_moe"), raw, config_of("llama"), "here")
