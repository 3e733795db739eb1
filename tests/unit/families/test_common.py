"""What the families read of a config: rotary frequencies, windows, sizes; and what they refuse rather than get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mswift.conversion.rules import Drop, Rule, Slab, TiedHead
from mswift.errors import ModelError
from mswift.families import families
from mswift.families.common import transformer_fields, windows
from mswift.families.rotations import rotation
from tests.parity.cases import every_case, options_of
from tests.parity.reference import written_tensors
from tests.tiny import DIMENSIONS, config_of, make_model


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


SCALINGS = {
    "default": rope("default"),
    "linear": rope("linear", factor=4.0),
    "llama3": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
}


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotary_frequencies_are_those_of_transformers(kind: str) -> None:
    config = config_of("llama", rope_parameters=SCALINGS[kind])
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(config)
    mine = rotation(config, 20)
    assert mine.inv_freq_of(7).dtype == torch.float32
    assert torch.equal(mine.inv_freq_of(7), theirs.inv_freq)
    assert mine.factor == pytest.approx(theirs.attention_scaling)
    assert (mine.factor != 1.0) == (kind == "yarn")
    assert mine.limit is None


@pytest.mark.parametrize("length", [5, 64, 65, 200])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length(kind: str, length: int) -> None:
    """Those that a model of transformers has after it has seen a sequence of this length."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    factors = {"short_factor": [1.0 + i for i in range(10)], "long_factor": [3.0 + 2 * i for i in range(10)]}
    parameters = rope(kind, factor=2.0) if kind == "dynamic" else rope(kind, **factors, original_max_position_embeddings=64)
    config = config_of("phi3", max_position_embeddings=64 if kind == "dynamic" else 256, original_max_position_embeddings=64)
    config.rope_parameters = {**parameters, "partial_rotary_factor": 1.0}
    theirs = Phi3RotaryEmbedding(config)
    theirs(torch.zeros(1), torch.arange(length)[None])
    mine = rotation(config, 20)
    assert mine.limit == 64
    torch.testing.assert_close(mine.inv_freq_of(length), theirs.inv_freq.float())
    assert torch.equal(mine.inv_freq_of(length), mine.inv_freq_of(1)) == (length <= 64)
    assert mine.factor == pytest.approx(theirs.attention_scaling)


def test_configs_of_older_transformers_mean_the_same() -> None:
    """As Llama 3.1 writes them: the base beside the scaling, the kind of scaling under either name."""
    from transformers import LlamaConfig

    def frequencies(config: Any) -> torch.Tensor:
        return rotation(config, 20).inv_freq_of(1)

    scaling = {name: value for name, value in SCALINGS["llama3"].items() if name != "rope_theta"}
    new = frequencies(config_of("llama", rope_parameters=SCALINGS["llama3"]))
    for key in ("rope_type", "type"):
        old = {**scaling, key: scaling["rope_type"]}
        if key == "type":
            del old["rope_type"]
        assert torch.equal(frequencies(LlamaConfig.from_dict({**DIMENSIONS, "rope_theta": 10000.0, "rope_scaling": old})), new)
    assert frequencies(LlamaConfig.from_dict({**DIMENSIONS, "rope_theta": 250.0}))[1].item() == pytest.approx(250.0**-0.1)


def test_an_unknown_rotation_is_refused() -> None:
    config = config_of("llama")
    config.rope_parameters = rope("spiral", factor=2.0)
    with pytest.raises(ModelError, match="rotary type 'spiral' is not supported exactly; wanted one of default, linear, llama3, yarn, "):
        rotation(config, 20)


def test_partial_rotations() -> None:
    parameters = rope("default", partial_rotary_factor=0.6)
    assert rotation(config_of("nemotron", hidden_act="relu2", rope_parameters=parameters), 20).inv_freq_of(1).shape == (6,)


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
    assert windows(config_of("qwen2", **used, max_window_layers=2)) == {"window_size": (5, 0), "window_attn_skip_freq": [0, 0, 1, 1]}
    assert windows(config_of("qwen3", **used, max_window_layers=0))["window_attn_skip_freq"] == [1, 1, 1, 1]
    assert windows(config_of("qwen2", **used, max_window_layers=4)) == {}
    assert windows(config_of("mistral", sliding_window=6)) == {"window_size": (5, 0), "window_attn_skip_freq": [1, 1, 1, 1]}
    assert windows(config_of("qwen2", use_sliding_window=False, sliding_window=6, max_window_layers=2)) == {}


@pytest.mark.parametrize("case", every_case())
def test_the_rules_name_every_tensor_of_the_model(case: str) -> None:
    name, changes = options_of(case)
    family = next(family for family in families() if family.name == name)
    model = make_model(name, **changes)
    rules = family.rules(model.config, family.describe(model.config).padding(2))
    exported = [rule for rule in rules if isinstance(rule, Rule) and rule.exported]
    named = [(source, rule.index if isinstance(rule, Slab) else None) for rule in exported for source in rule.sources]
    assert len(named) == len(set(named))
    assert {source for source, _ in named} == set(written_tensors(model))
    tied = bool(model.config.tie_word_embeddings)
    assert any(isinstance(rule, TiedHead) for rule in rules) == tied
    dropped = [rule for rule in rules if isinstance(rule, Drop)]
    assert any(rule.matches("model.layers.11.self_attn.rotary_emb.inv_freq") for rule in dropped)
    assert any(rule.matches("lm_head.weight") for rule in dropped) == tied
