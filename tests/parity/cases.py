"""One tiny config or more for every registered family: what the parity tests run over. A new family adds its own here."""

from __future__ import annotations

from typing import Any

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
_YARN_SHORT = {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
_ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
_FOUR_KEY_HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
_LATENT = {
    "head_dim": 10,
    "rms_norm_eps": 0.2,  # the narrow layers' norms do not heed it
    "num_key_value_heads": 6,
    "q_lora_rank": 28,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
}
_STRETCHED = {**_YARN, "original_max_position_embeddings": 64, "mscale": 1.3, "mscale_all_dim": 0.8}
_LLAMA4 = {
    "num_local_experts": 4,
    "intermediate_size": 28,
    "intermediate_size_mlp": 48,
    "no_rope_layer_interval": 3,
    "attention_chunk_size": 6,
    "floor_scale": 5,
    "attn_scale": 0.7,
    "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32},
}
_NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(10)],
    "long_factor": [2.0 + 0.5 * i for i in range(10)],
}

_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
_ERNIE = {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 28}
_PHIMOE = {"num_local_experts": 6, "router_jitter_noise": 0.1, "num_experts_per_tok": 2}
_PHIMOE_ROPE = {**_LONGROPE, "original_max_position_embeddings": 64, "short_mscale": 1.2, "long_mscale": 1.3}
_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "llama3-rope": {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}},
        "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        "yarn-rope": {"rope_parameters": {**_YARN, "original_max_position_embeddings": 64}},
        "dynamic-rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}, "max_position_embeddings": 16},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "derived-head-dim": {"head_dim": None},
        "tied": {"tie_word_embeddings": True},
        "no-groups": {"num_key_value_heads": 6},
        "one-group": {"num_key_value_heads": 1},
    },
    "qwen2": {
        "plain": {},
        "windows": _WINDOWS,
        "window-not-used": {**_WINDOWS, "use_sliding_window": False},
        "tied": {"tie_word_embeddings": True},
        "two-groups": {"num_attention_heads": 8, "num_key_value_heads": 2},
    },
    "qwen3": {
        "plain": {},
        "windows": _WINDOWS,
        "biases": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
        "one-group": {"num_key_value_heads": 1},
    },
    "mistral": {"plain": {}, "windows": {"sliding_window": 6}},
    "ministral": {"plain": {"sliding_window": 6, "layer_types": _MIXED}, "windows-nowhere": {"layer_types": ["full_attention"] * 4}},
    "ministral3": {"plain": {"rope_parameters": {**_YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.3}}},
    "phi3": {
        "plain": {},
        "windows": {"sliding_window": 6},
        "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6}},
        "longrope-short": {"rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 64},
        "longrope-long": {"rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 16},
        "one-group": {"num_key_value_heads": 1},
    },
    "glm": {"plain": {}, "biases": {"attention_bias": True}},
    "glm4": {"plain": {}, "biases": {"attention_bias": True}},
    "gemma": {"plain": {"hidden_act": "gelu_pytorch_tanh"}, "untied": {"tie_word_embeddings": False, "hidden_act": "gelu_pytorch_tanh"}},
    "gemma2": {
        "plain": {"sliding_window": 6, "query_pre_attn_scalar": 30, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        "no-limits": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "biases": {"attention_bias": True},
    },
    "gemma3_text": {
        "plain": {"sliding_window": 6, "layer_types": _MIXED, "query_pre_attn_scalar": 30},
        "scaled": {
            "sliding_window": 6,
            "layer_types": _MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
    },
    "olmo2": {"plain": {}, "one-group": {"num_key_value_heads": 1}, "biases": {"attention_bias": True}},
    "olmo3": {
        "plain": {"sliding_window": 6, "layer_types": _MIXED},
        "yarn-rope": {
            "sliding_window": 6,
            "layer_types": _MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {**_YARN, "original_max_position_embeddings": 64},
            },
        },
    },
    "granite": {
        "plain": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 0.7},
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
    "smollm3": {"plain": {"no_rope_layers": [1, 0, 1, 1]}, "biases": {"no_rope_layers": [1] * 4, "attention_bias": True, "mlp_bias": True}},
    "cohere": {
        "plain": {"logit_scale": 0.3},
        "head-norms": {"use_qk_norm": True},
        "one-group": {"use_qk_norm": True, "num_key_value_heads": 1},
        "biases": {"attention_bias": True},
    },
    "cohere2": {"plain": {"logit_scale": 0.3, "sliding_window": 6, "layer_types": _MIXED}},
    "starcoder2": {"plain": {"sliding_window": 6}, "no-window": {}, "no-biases": {"use_bias": False}},
    "ernie4_5": {"plain": {}, "biases": {"use_bias": True}},
    "seed_oss": {
        "plain": _NO_DROPOUT,
        "biases": {"attention_out_bias": True, "mlp_bias": True, **_NO_DROPOUT},
        "no-biases": {"attention_bias": False, **_NO_DROPOUT},
    },
    "mixtral": {"plain": {"num_local_experts": 6, "num_experts_per_tok": 2}, "windows": {"num_local_experts": 4, "sliding_window": 6}},
    "qwen2_moe": {
        "plain": {**_EXPERTS, "shared_expert_intermediate_size": 44, "qkv_bias": True},
        "normalised-some-dense": {**_EXPERTS, "shared_expert_intermediate_size": 44, "norm_topk_prob": True, "mlp_only_layers": [1]},
    },
    "qwen3_moe": {"plain": {**_EXPERTS, "norm_topk_prob": True}, "not-normalised": {**_EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2}},
    "olmoe": {
        "plain": {"num_experts": 6, "num_experts_per_tok": 3},
        "normalised": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    },
    "glm4_moe": {
        "plain": {**_ROUTED, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
        "one-group": {**_ROUTED, "n_group": 1, "topk_group": 1, "use_qk_norm": True, "attention_bias": True},
    },
    "deepseek_v3": {
        "plain": {**_ROUTED, **_LATENT, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "rope_parameters": _STRETCHED},
        "no-narrow-queries": {**_ROUTED, **_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        "halves-biases": {
            **_ROUTED,
            **_LATENT,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "n_group": 4,
            "topk_group": 3,
            "rope_interleave": False,
            "attention_bias": True,
        },
        "dense": {**_ROUTED, **_LATENT, "num_attention_heads": 5, "num_key_value_heads": 5, "n_group": 4, "first_k_dense_replace": 4},
        "not-normalised": {**_ROUTED, **_LATENT, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "num_mtp_layers": 0},
    },
    "deepseek_v2": {
        "plain": {
            **_ROUTED,
            **_LATENT,
            "norm_topk_prob": False,
            "rope_parameters": _STRETCHED,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
        "lite": {**_ROUTED, **_LATENT, "norm_topk_prob": False, "q_lora_rank": None, "attention_bias": True},
    },
    "llama4_text": {
        "plain": {**_LLAMA4, "interleave_moe_layer_step": 2},
        "no-norms-biases": {**_LLAMA4, "use_qk_norm": False, "attention_bias": True, "no_rope_layers": [1] * 4},
        "dense": {**_LLAMA4, "moe_layers": [], "attention_chunk_size": None, "no_rope_layers": [0, 1, 1, 0], "floor_scale": 3},
    },
    "dots1": {"plain": {**_ROUTED, "sliding_window": 6, "layer_types": _MIXED, "n_group": 1}},
    "minimax_m2": {
        "plain": {"num_local_experts": 6, "num_experts_per_tok": 3},
        "partial": {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6},
        },
    },
    "qwen3_next": {
        "plain": {**_EXPERTS, "shared_expert_intermediate_size": 44},
        "not-normalised-some-dense": {
            **_EXPERTS,
            "shared_expert_intermediate_size": 44,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            **_FOUR_KEY_HEADS,
        },
        "dense-biases": {"num_experts": 0, "attention_bias": True, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
        "yarn-rope": {
            "num_experts": 0,
            "rope_parameters": {**_YARN, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.4},
        },
    },
    "qwen3_5_text": {
        "plain": {},
        "one-group": {"num_key_value_heads": 1, "tie_word_embeddings": True},
        "biases": {"attention_bias": True, "linear_conv_kernel_dim": 3, "full_attention_interval": 2, **_FOUR_KEY_HEADS},
    },
    "qwen3_5_moe_text": {"plain": {**_EXPERTS, "shared_expert_intermediate_size": 44}},
    "gpt_oss": {
        "plain": {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 6, "swiglu_limit": 0.4, "rope_parameters": _YARN_SHORT},
        "no-biases": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": False, "layer_types": ["full_attention"] * 4},
        "one-group": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "num_key_value_heads": 1},
    },
    "ernie4_5_moe": {
        "plain": {**_ERNIE, "moe_layer_start_index": 1, "tie_word_embeddings": False},
        "interval": {**_ERNIE, "moe_layer_interval": 2, "moe_layer_end_index": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 0},
        "floor": {**_ERNIE, "moe_norm_min": 0.9, "moe_k": 2},
        "biases": {**_ERNIE, "use_bias": True, "moe_num_shared_experts": 0, "moe_layer_start_index": 1},
    },
    "granitemoe": {
        "plain": {**_LOCAL, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 0.7},
        "biases": {**_LOCAL, "attention_bias": True, "tie_word_embeddings": True},
    },
    "phimoe": {
        "plain": {**_PHIMOE, "attention_bias": True, "lm_head_bias": True},
        "near": {**_PHIMOE, "router_jitter_noise": 0.4, "sliding_window": 6},
        "longrope": {**_PHIMOE, "rope_parameters": _PHIMOE_ROPE, "original_max_position_embeddings": 64},
    },
    "hunyuan_v1_moe": {
        "plain": {"num_experts": 6, "moe_topk": 3},
        "alpha": {"num_experts": 6, "moe_topk": 3, "attention_bias": True, "rope_parameters": _ALPHA},
    },
    "hunyuan_v1_dense": {"plain": {}, "alpha": {"attention_bias": True, "rope_parameters": _ALPHA}},
    "nemotron": {"plain": {"hidden_act": "relu2"}, "biases": {"hidden_act": "relu2", "attention_bias": True, "mlp_bias": True}},
}


def every_case() -> list[str]:
    """``family/variant`` of all of them."""
    return [f"{family}/{variant}" for family, variants in CASES.items() for variant in variants]


def options_of(case: str) -> tuple[str, dict[str, Any]]:
    """(family, changes to its tiny config) of ``family/variant``."""
    family, variant = case.split("/")
    return family, CASES[family][variant]


MIXTURES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "dots1", "minimax_m2", "deepseek_v2", "deepseek_v3", "qwen3_next"),
    *("qwen3_5_moe_text", "gpt_oss", "ernie4_5_moe", "granitemoe", "phimoe", "hunyuan_v1_moe", "llama4_text"),
)
"""Families with routed experts."""
