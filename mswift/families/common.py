"""What the decoder families share: the config fields that mean the same everywhere, rotary frequencies, and the rules of a plain block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mswift.conversion.rules import AnyRule, Drop, FusedGateUp, FusedQKV, PaddedVocab, Rename, Rule, TiedHead
from mswift.errors import ModelError
from mswift.families.base import HfConfig, MegatronDescription, Padding

if TYPE_CHECKING:
    import torch

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary scalings whose frequencies do not depend on the length of the sequence at hand."""


def transformer_fields(hf: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields that every decoder family here reads alike.

    Raises:
        ModelError: an activation that these families do not have.
    """
    from torch.nn import functional

    if hf.hidden_act != "silu":
        raise ModelError(f"hidden_act is {hf.hidden_act!r}, wanted 'silu' for {hf.model_type}; this variant is not supported")
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": hf.head_dim if "head_dim" in hf.to_dict() and hf.head_dim else hf.hidden_size // hf.num_attention_heads,
        "layernorm_epsilon": hf.rms_norm_eps,
        "normalization": "RMSNorm",
        "activation_func": functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": float(hf.attention_dropout or 0.0),
        "init_method_std": hf.initializer_range,
    }


def rotary(hf: HfConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """(inverse frequencies fp32 ``[head_dim / 2]``, factor on cos and sin), from transformers' own functions.

    Raises:
        ModelError: a rotary type whose frequencies change with the sequence length.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ROTARY_TYPES:
        raise ModelError(f"rotary type {kind!r} is not supported exactly; wanted one of {', '.join(ROTARY_TYPES)}")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return inv_freq, float(factor)


def sliding_window(hf: HfConfig) -> dict[str, Any]:
    """window_size and window_attn_skip_freq (1 = windowed, 0 = full, by layer) where the config asks for windows."""
    kinds = hf.layer_types or []
    if not hf.use_sliding_window or hf.sliding_window is None or "sliding_attention" not in kinds:
        return {}
    # megatron keeps keys at distance <= window_size[0]: W tokens, the query's own included, are W - 1
    return {
        "window_size": (hf.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
    }


def describe_decoder(hf: HfConfig, *, output_bias: bool = False, mlp_bias: bool = False, **extra: Any) -> MegatronDescription:
    """The description of a pre-norm decoder with grouped queries, rotary positions and a gated MLP."""
    fields = {**transformer_fields(hf), **extra}
    inv_freq, factor = rotary(hf, fields["kv_channels"])
    if factor != 1.0:
        # cos and sin of queries and of keys are scaled: the scores by the factor squared
        fields["softmax_scale"] = factor**2 / fields["kv_channels"] ** 0.5
    return MegatronDescription(
        transformer=fields,
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        tied=bool(hf.tie_word_embeddings),
        inv_freq=inv_freq,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
    )


def decoder_rules(
    hf: HfConfig, padding: Padding, *, qkv_bias: bool = False, output_bias: bool = False, mlp_bias: bool = False, qk_norm: bool = False
) -> tuple[AnyRule, ...]:
    """One rule for every tensor of such a decoder."""
    rules: list[AnyRule] = [
        PaddedVocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", hf.vocab_size, padding.vocab),
        Rename("decoder.final_layernorm.weight", "model.norm.weight"),
        Drop(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a constant that old checkpoints carry"),
    ]
    if hf.tie_word_embeddings:
        rules.append(TiedHead("output_layer.weight", "model.embed_tokens.weight", hf.vocab_size, padding.vocab))
        rules.append(Drop(r"lm_head\.weight", "tied to the embedding", equals="model.embed_tokens.weight"))
    else:
        rules.append(PaddedVocab("output_layer.weight", "lm_head.weight", hf.vocab_size, padding.vocab))
    for layer in range(hf.num_hidden_layers):
        rules += _block_rules(hf, padding, layer, qkv_bias=qkv_bias, output_bias=output_bias, mlp_bias=mlp_bias, qk_norm=qk_norm)
    return tuple(rules)


def _block_rules(hf: HfConfig, padding: Padding, layer: int, *, qkv_bias: bool, output_bias: bool, mlp_bias: bool, qk_norm: bool) -> list[Rule]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    heads, groups = hf.num_attention_heads, hf.num_key_value_heads
    head_dim = transformer_fields(hf)["kv_channels"]

    def qkv(kind: str) -> Rule:
        q, k, v = (f"{theirs}self_attn.{letter}_proj.{kind}" for letter in "qkv")
        target = f"{ours}self_attention.linear_qkv.{kind}"
        return FusedQKV(target, q, k, v, num_groups=groups, heads_per_group=heads // groups, head_dim=head_dim, padded_groups=padding.groups)

    def mlp(kind: str) -> list[Rule]:
        return [
            FusedGateUp(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}"),
            Rename(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}mlp.down_proj.{kind}"),
        ]

    rules = [
        Rename(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight"),
        qkv("weight"),
        Rename(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", columns=heads * head_dim),
        Rename(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight"),
        *mlp("weight"),
    ]
    if qkv_bias:
        rules.append(qkv("bias"))
    if output_bias:
        rules.append(Rename(f"{ours}self_attention.linear_proj.bias", f"{theirs}self_attn.o_proj.bias"))
    if mlp_bias:
        rules += mlp("bias")
    if qk_norm:
        rules += [Rename(f"{ours}self_attention.{letter}_layernorm.weight", f"{theirs}self_attn.{letter}_norm.weight") for letter in "qk"]
    return rules
