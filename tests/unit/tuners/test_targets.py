"""Names of ``--target_modules`` in mixtures, and the line that says what got an adapter. megatron-core is not needed here."""

from __future__ import annotations

import pytest

from mswift.errors import ConfigError
from mswift.tuners.targets import ADAPTABLE, ALL_LINEAR, EXPERT_LINEAR, adaptable, coverage, kind_of, resolve_targets

OWN = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", *EXPERT_LINEAR, "shared_expert_gate", "router", "word_embeddings", "output_layer")


def test_kinds_tell_routed_experts_from_shared_ones() -> None:
    assert kind_of("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1") == "experts.linear_fc1"
    assert kind_of("decoder.layers.0.mlp.shared_experts.linear_fc1") == "linear_fc1"
    assert kind_of("decoder.layers.0.mlp.shared_experts.gate_weight") == "shared_expert_gate"
    assert adaptable("decoder.layers.0.mlp.router.weight") == "decoder.layers.0.mlp.router"
    assert adaptable("decoder.layers.0.mlp.router.bias") is None
    assert adaptable("decoder.final_layernorm.weight") is None
    assert set(EXPERT_LINEAR) < set(ALL_LINEAR) < set(ADAPTABLE)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["all-linear"], OWN[:7]),
        (["all-linear", "all-router", "all-embedding", "lm_head"], OWN),
        (["experts"], EXPERT_LINEAR),
        (["gate_proj", "up_proj"], ("linear_fc1", "experts.linear_fc1")),
        (["w2", "gate"], ("linear_fc2", "experts.linear_fc2", "router")),
        (["embed_tokens", "linear_qkv"], ("linear_qkv", "word_embeddings")),
        (["shared_expert_gate"], ("shared_expert_gate",)),
    ],
)
def test_names_in_a_mixture(names: list[str], expected: tuple[str, ...]) -> None:
    assert resolve_targets(names, OWN) == expected


def test_dora_leaves_out_what_it_cannot_do_and_says_so_when_named() -> None:
    assert resolve_targets(["all-linear"], OWN, use_dora=True) == ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "shared_expert_gate")
    with pytest.raises(ConfigError, match=r"--use_dora true is not done on experts\.linear_fc1, experts\.linear_fc2, router; leave these out"):
        resolve_targets(["experts", "gate", "o_proj"], OWN, use_dora=True)
    with pytest.raises(ConfigError, match="got 'lm_head', wanted a model with a head of its own: that of this one is its embedding"):
        resolve_targets(["lm_head"], OWN[:-1])
    with pytest.raises(ConfigError, match=r"got .all-router., wanted one of all-linear, q_proj"):
        resolve_targets(["all-router"], ("linear_qkv",))


def test_the_line_on_what_has_an_adapter() -> None:
    kinds = ("linear_qkv", "mlp.experts.local_experts.0.linear_fc1", "mlp.router")
    layers = [f"decoder.layers.{layer}.{name}" for layer in range(2) for name in kinds]
    adapted = [name for name in layers if "router" not in name and "layers.1.linear_qkv" not in name]
    assert coverage(adapted, [*layers, "output_layer"]) == ("adapters on 1 of 2 linear_qkv, 2 experts.linear_fc1; none on 2 router, 1 output_layer")
    assert coverage(layers, layers) == "adapters on 2 linear_qkv, 2 experts.linear_fc1, 2 router"
