"""Multi-head latent attention (DeepSeek): the config fields of it, and the rules of its tensors."""

from __future__ import annotations

import math

from mswift.conversion.rules import PaddedRows, Rename, Rule
from mswift.errors import ModelError
from mswift.families.base import AttentionStyle, HfConfig, LatentStyle, MegatronDescription, Padding
from mswift.families.rotations import rotation


def latent_attention(hf: HfConfig, *, interleaved: bool) -> AttentionStyle:
    """Latent attention with one rotation for all layers.

    Raises:
        ModelError: groups of queries, which latent attention has not.
    """
    if hf.num_key_value_heads != hf.num_attention_heads:
        raise ModelError(
            f"num_key_value_heads is {hf.num_key_value_heads}, wanted num_attention_heads ({hf.num_attention_heads}): "
            "every head of latent attention has keys of its own; mend config.json"
        )
    latent = LatentStyle(
        q_rank=hf.q_lora_rank,
        kv_rank=hf.kv_lora_rank,
        plain=hf.qk_nope_head_dim,
        rotated=hf.qk_rope_head_dim,
        values=hf.v_head_dim,
        bias=bool(hf.attention_bias),
    )
    one = rotation(hf, hf.qk_rope_head_dim)
    return AttentionStyle((one,), (0,) * hf.num_hidden_layers, interleaved=interleaved, latent=latent)


def latent_fields(hf: HfConfig) -> dict[str, float]:
    """TransformerConfig fields: a head is as wide as its values, and the scores have a scale that grows with a stretched rotation."""
    scale, parameters = hf.qk_head_dim**-0.5, hf.rope_parameters
    stretch = parameters.get("mscale_all_dim") if parameters.get("rope_type", "default") != "default" else None
    if stretch and parameters["factor"] > 1:
        scale *= (0.1 * stretch * math.log(parameters["factor"]) + 1.0) ** 2
    return {"kv_channels": hf.v_head_dim, "softmax_scale": scale}


def latent_rules(ours: str, theirs: str, description: MegatronDescription, padding: Padding) -> list[Rule]:
    """The rules of one layer's attention; heads that are added as padding are zeros."""
    latent, heads = description.attention.latent, description.transformer["num_attention_heads"]
    assert latent is not None

    def wide(target: str, source: str, width: int) -> Rule:
        return PaddedRows(f"{ours}{target}.weight", f"{theirs}{source}.weight", heads * width, padding.groups * width)

    narrow, norms = [("linear_kv_down_proj", "kv_a_proj_with_mqa")], [("kv_layernorm", "kv_a_layernorm")]
    if latent.q_rank is not None:
        narrow.append(("linear_q_down_proj", "q_a_proj"))
        norms.append(("q_layernorm", "q_a_layernorm"))
    biased = [*(narrow if latent.bias else ()), *([("linear_proj", "o_proj")] if description.output_bias else ())]
    query = "linear_q_proj" if latent.q_rank is None else "linear_q_up_proj"
    return [
        wide(query, "q_proj" if latent.q_rank is None else "q_b_proj", latent.plain + latent.rotated),
        wide("linear_kv_up_proj", "kv_b_proj", latent.plain + latent.values),
        Rename(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", columns=heads * latent.values),
        *(Rename(f"{ours}{mine}.weight", f"{theirs}{its}.weight") for mine, its in (*narrow, *norms)),
        *(Rename(f"{ours}{mine}.bias", f"{theirs}{its}.bias") for mine, its in biased),
    ]
