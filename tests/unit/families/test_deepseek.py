"""What DeepSeek's configs can say: other names of the same architecture, and variants that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mswift.errors import LayoutError, ModelError
from mswift.families.fields import unknown_fields
from mswift.families.model import read_hf_config
from mswift.parallel.layout import ParallelLayout
from tests.parity.cases import options_of
from tests.tiny import config_of
from tests.unit.families.test_unknown_fields import family_of

PUBLISHED = {
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
}
"""What the published config.json of DeepSeek-V3 has besides the fields that transformers knows."""


def describe(case: str, **changes: Any) -> Any:
    kind, options = options_of(case)
    config = config_of(kind, **{**options, **changes})
    return family_of(kind).describe(config)


def test_kimi_k2_is_deepseek_v3(tmp_path: Path) -> None:
    kind, changes = options_of("deepseek_v3/plain")
    raw = {**config_of(kind, **changes).to_dict(), **PUBLISHED, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}
    scaling = {name: value for name, value in raw.pop("rope_parameters").items() if name not in ("rope_type", "rope_theta")}
    raw |= {"rope_scaling": {**scaling, "type": "yarn"}, "rope_theta": 10000.0, "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_hf_config(tmp_path)
    family = family_of("deepseek_v3")
    expected = describe("deepseek_v3/plain")
    found = family.describe(config)
    assert unknown_fields(raw, config, family.describe) == {}
    assert found.transformer == expected.transformer
    assert found.choice == expected.choice
    assert found.attention.latent == expected.attention.latent
    assert found.attention.rotations[0].inv_freq_of(1).tolist() == expected.attention.rotations[0].inv_freq_of(1).tolist()
    assert found.further_layers == 1


def test_the_scale_of_the_published_model() -> None:
    """DeepSeek-V3: factor 40 with mscale_all_dim 1, heads of 128 + 64 columns."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "head_dim": 64, "max_position_embeddings": 163840}
    found = describe("deepseek_v3/plain", **sizes, rope_parameters={**yarn, "mscale_all_dim": 1.0})
    assert found.transformer["softmax_scale"] == pytest.approx(0.1352337788608801)
    assert found.attention.rotations[0].factor == 1.0


@pytest.mark.parametrize(
    ("case", "changes", "text"),
    [
        ("deepseek_v3/plain", {"scoring_func": "softmax"}, "scoring_func is 'softmax' in this deepseek_v3 config, wanted 'sigmoid'"),
        ("deepseek_v3/plain", {"topk_method": "greedy"}, "topk_method is 'greedy' in this deepseek_v3 config, wanted 'noaux_tc'"),
        ("deepseek_v3/plain", {"moe_layer_freq": 2}, "moe_layer_freq is 2 in this deepseek_v3 config, wanted 1"),
        ("deepseek_v3/plain", {"num_key_value_heads": 3}, r"num_key_value_heads is 3, wanted num_attention_heads \(6\)"),
        ("deepseek_v3/plain", {"n_group": 3}, "8 routed experts in n_group 3, of which topk_group 2 with num_experts_per_tok 3: wanted equal"),
        ("deepseek_v3/plain", {"n_group": 8}, "8 routed experts in n_group 8, .* wanted equal groups of at least 2"),
        ("deepseek_v2/plain", {"topk_group": 1}, "8 routed experts in n_group 4, of which topk_group 1 .* enough experts in the chosen ones"),
        ("deepseek_v2/plain", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', wanted 'greedy' or 'group_limited_greedy'"),
        ("deepseek_v2/plain", {"norm_topk_prob": True}, "norm_topk_prob is True in this deepseek_v2 config, wanted False"),
        ("deepseek_v2/lite", {"mlp_bias": True}, "mlp_bias is True in this deepseek_v2 config, wanted False"),
    ],
)
def test_variants_that_are_refused(case: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        describe(case, **changes)


def test_narrow_layers_must_divide() -> None:
    latent = describe("deepseek_v3/plain", q_lora_rank=27).attention.latent
    with pytest.raises(LayoutError, match=r"does not divide this model: narrow layer of 27 columns by tp\(2\); choose sizes that divide them"):
        ParallelLayout(world=2, tp=2).check_model(num_layers=4, ffn_size=48, narrow=latent.narrow)
