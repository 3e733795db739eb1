"""Names of the Transformer Engine spec: every parameter of every family against the names that megatron-core documents."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mswift.families import find_family
from mswift.families.te_names import fused_norms, te_name
from tests.parity.cases import every_case, options_of
from tests.tiny import config_of

DOCUMENTED = re.compile(
    r"embedding\.word_embeddings\.weight|output_layer\.(weight|bias)|decoder\.final_layernorm\.(weight|bias)|decoder\.layers\.\d+\.("
    r"(input_layernorm|pre_mlp_layernorm)\.(weight|bias)"
    r"|self_attention\.(linear_qkv|in_proj)\.(weight|bias|layer_norm_weight|layer_norm_bias)"
    r"|self_attention\.(q_layernorm|k_layernorm)\.(weight|bias)|self_attention\.(linear_proj|out_proj)\.(weight|bias)"
    r"|self_attention\.core_attention\.softmax_offset|self_attention\.(conv1d\.weight|A_log|dt_bias|out_norm\.weight)"
    r"|self_attention\.linear_(q|q_down|kv_down)_proj\.(weight|bias)|self_attention\.linear_(q|kv)_up_proj\.(weight|layer_norm_weight)"
    r"|mlp\.linear_fc1\.(weight|bias|layer_norm_weight|layer_norm_bias)|mlp\.linear_fc2\.(weight|bias)"
    r"|mlp\.router\.(weight|bias|expert_bias)|mlp\.experts\.linear_fc[12]\.(weight|bias)\d+"
    r"|mlp\.shared_experts\.(linear_fc[12]\.weight|gate_weight)"
    r"|(self_attn|mlp)_bda\.norm\.weight|self_attention\.rotated_[qk]_layernorm\.weight)"  # ours: megatron-core has no such norms
)


def targets(case: str) -> tuple[Any, list[str]]:
    """The description of a tiny model, and the name of its every parameter."""
    kind, changes = options_of(case)
    config = config_of(kind, **changes)
    from transformers import AutoModelForCausalLM

    architecture = AutoModelForCausalLM._model_mapping[type(config)].__name__
    family = find_family([architecture], case)
    description = family.describe(config)
    return description, [rule.target for rule in family.rules(config, description.padding(1)) if hasattr(rule, "target")]


@pytest.mark.parametrize("case", every_case())
def test_every_parameter_has_a_documented_name(case: str) -> None:
    description, names = targets(case)
    renamed = [te_name(name, description) for name in names]
    assert [name for name in renamed if not DOCUMENTED.fullmatch(name)] == []
    assert len(set(renamed)) == len(names)
    norms = [name for name in renamed if re.search(r"\.\d+\.(input|pre_mlp)_layernorm\.weight", name)]
    unfused = description.parallel or description.attention.latent is not None
    mixtures = [layer for layer in range(4) if description.is_mixture(layer)]
    alone = {f"decoder.layers.{layer}.pre_mlp_layernorm.weight" for layer in mixtures}
    alone |= {f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(4)} if unfused else set()
    assert set(norms) == (alone if description.pre_norms else set())


LAYERS = {
    "llama/plain": (
        0,
        [f"self_attention.linear_{name}weight" for name in ("qkv.layer_norm_", "qkv.", "proj.")]
        + [f"mlp.linear_{name}weight" for name in ("fc1.layer_norm_", "fc1.", "fc2.")],
    ),
    "deepseek_v3/plain": (
        0,
        ["input_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        + [f"self_attention.linear_{name}.weight" for name in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")]
        + [f"self_attention.linear_{name}_up_proj.layer_norm_weight" for name in ("q", "kv")],
    ),
    "deepseek_v3/no-narrow-queries": (
        1,
        ["input_layernorm.weight", "pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.router.expert_bias"]
        + [f"mlp.shared_experts.linear_fc{one}.weight" for one in (1, 2)]
        + [f"mlp.experts.linear_fc{one}.weight{expert}" for one in (1, 2) for expert in range(8)]
        + [f"self_attention.linear_{name}.weight" for name in ("q_proj", "kv_down_proj", "kv_up_proj", "proj")]
        + ["self_attention.linear_kv_up_proj.layer_norm_weight"],
    ),
    "gpt_oss/plain": (
        3,
        ["pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.router.bias", "self_attention.core_attention.softmax_offset"]
        + [f"self_attention.linear_qkv.{kind}" for kind in ("weight", "bias", "layer_norm_weight")]
        + [f"self_attention.linear_proj.{kind}" for kind in ("weight", "bias")]
        + [f"mlp.experts.linear_fc{one}.{kind}{expert}" for one in (1, 2) for expert in range(6) for kind in ("weight", "bias")],
    ),
    "qwen3_next/dense-biases": (
        0,
        [f"self_attention.{name}" for name in ("in_proj.weight", "in_proj.layer_norm_weight", "conv1d.weight", "A_log", "dt_bias")]
        + ["self_attention.out_norm.weight", "self_attention.out_proj.weight"]
        + ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"],
    ),
    "starcoder2/plain": (
        1,
        [f"self_attention.linear_qkv.{kind}" for kind in ("weight", "bias", "layer_norm_weight", "layer_norm_bias")]
        + [f"self_attention.linear_proj.{kind}" for kind in ("weight", "bias")]
        + [f"mlp.linear_fc1.{kind}" for kind in ("weight", "bias", "layer_norm_weight", "layer_norm_bias")]
        + ["mlp.linear_fc2.weight", "mlp.linear_fc2.bias"],
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_one_layer_has_exactly_these_names(case: str) -> None:
    layer, wanted = LAYERS[case]
    description, names = targets(case)
    prefix = f"decoder.layers.{layer}."
    assert {te_name(name, description) for name in names if name.startswith(prefix)} == {prefix + name for name in wanted}
    assert te_name("embedding.word_embeddings.weight", description) == "embedding.word_embeddings.weight"


def test_dense_grouped_queries_are_mapped_as_megatrons_own_local_spec_maps_them() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    description, _ = targets("llama/plain")
    assert fused_norms(description, 2) == get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    assert fused_norms(targets("olmo2/plain")[0], 0) == {}
