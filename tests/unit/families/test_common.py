"""What the families read of a config: rotary frequencies, windows, sizes; and what they refuse rather than get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mswift.conversion.rules import Drop, Rule, TiedHead
from mswift.errors import ModelError
from mswift.families import families, find_family
from mswift.families.common import ROTARY_TYPES, rotary, sliding_window, transformer_fields
from tests.parity.cases import every_case, options_of
from tests.tiny import DIMENSIONS, config_of, make_model


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


SCALINGS = {
    "default": rope("default"),
    "linear": rope("linear", factor=4.0),
    "llama3": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
}


@pytest.mark.parametrize("kind", ROTARY_TYPES)
def test_rotary_frequencies_are_those_of_transformers(kind: str) -> None:
    config = config_of("llama", rope_parameters=SCALINGS[kind])
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(config)
    inv_freq, factor = rotary(config, 20)
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling)
    assert (factor != 1.0) == (kind == "yarn")


def test_configs_of_older_transformers_mean_the_same() -> None:
    """As Llama 3.1 writes them: the base beside the scaling, the kind of scaling under either name."""
    from transformers import LlamaConfig

    scaling = {name: value for name, value in SCALINGS["llama3"].items() if name != "rope_theta"}
    new = rotary(config_of("llama", rope_parameters=SCALINGS["llama3"]), 20)[0]
    for key in ("rope_type", "type"):
        old = {**scaling, key: scaling["rope_type"]}
        if key == "type":
            del old["rope_type"]
        config = LlamaConfig.from_dict({**DIMENSIONS, "rope_theta": 10000.0, "rope_scaling": old})
        assert torch.equal(rotary(config, 20)[0], new)
    plain = LlamaConfig.from_dict({**DIMENSIONS, "rope_theta": 250.0})
    assert rotary(plain, 20)[0][1].item() == pytest.approx(250.0**-0.1)


def test_a_scaled_rotation_scales_the_scores_by_its_square() -> None:
    config = config_of("llama", rope_parameters=SCALINGS["yarn"])
    description = find_family(["LlamaForCausalLM"], "here").describe(config)
    _, factor = rotary(config, 20)
    assert description.transformer["softmax_scale"] == pytest.approx(factor**2 / 20**0.5)
    assert "softmax_scale" not in find_family(["LlamaForCausalLM"], "here").describe(config_of("llama")).transformer


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_refused(kind: str) -> None:
    config = config_of("llama")
    config.rope_parameters = rope(kind, factor=2.0)
    with pytest.raises(ModelError, match=f"rotary type '{kind}' is not supported exactly; wanted one of default, linear, llama3, yarn"):
        rotary(config, 20)


def test_an_activation_that_the_family_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match="hidden_act is 'gelu', wanted 'silu' for llama"):
        transformer_fields(config_of("llama", hidden_act="gelu"))
    fields = transformer_fields(config_of("llama", attention_dropout=0.25))
    assert fields["attention_dropout"] == 0.25
    assert fields["hidden_dropout"] == 0.0


@pytest.mark.parametrize(("changes", "head_dim"), [({}, 20), ({"head_dim": None}, 12), ({"head_dim": 6}, 6)])
def test_head_size(changes: dict[str, Any], head_dim: int) -> None:
    assert transformer_fields(config_of("llama", **changes))["kv_channels"] == head_dim
    assert transformer_fields(config_of("qwen2", head_dim=10))["kv_channels"] == 10  # hidden size / heads: it has no field of its own


def test_windows() -> None:
    used = {"use_sliding_window": True, "sliding_window": 6}
    assert sliding_window(config_of("qwen2", **used, max_window_layers=2)) == {"window_size": (5, 0), "window_attn_skip_freq": [0, 0, 1, 1]}
    assert sliding_window(config_of("qwen3", **used, max_window_layers=0))["window_attn_skip_freq"] == [1, 1, 1, 1]
    assert sliding_window(config_of("qwen2", **used, max_window_layers=4)) == {}
    assert sliding_window(config_of("qwen2", use_sliding_window=False, sliding_window=6, max_window_layers=2)) == {}


@pytest.mark.parametrize("case", every_case())
def test_the_rules_name_every_tensor_of_the_model(case: str) -> None:
    name, changes = options_of(case)
    family = next(family for family in families() if family.name == name)
    model = make_model(name, **changes)
    rules = family.rules(model.config, family.describe(model.config).padding(2))
    named = [source for rule in rules if isinstance(rule, Rule) and rule.exported for source in rule.sources]
    assert len(named) == len(set(named))
    assert set(named) == {name for name, _ in model.named_parameters()}
    tied = bool(model.config.tie_word_embeddings)
    assert any(isinstance(rule, TiedHead) for rule in rules) == tied
    dropped = [rule for rule in rules if isinstance(rule, Drop)]
    assert any(rule.matches("model.layers.11.self_attn.rotary_emb.inv_freq") for rule in dropped)
    assert any(rule.matches("lm_head.weight") for rule in dropped) == tied
