"""One tiny config or more for every registered family: what the parity tests run over. A new family adds its own here."""

from __future__ import annotations

from typing import Any

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "llama3-rope": {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}},
        "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        "yarn-rope": {"rope_parameters": {**_YARN, "original_max_position_embeddings": 64}},
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
}


def every_case() -> list[str]:
    """``family/variant`` of all of them."""
    return [f"{family}/{variant}" for family, variants in CASES.items() for variant in variants]


def options_of(case: str) -> tuple[str, dict[str, Any]]:
    """(family, changes to its tiny config) of ``family/variant``."""
    family, variant = case.split("/")
    return family, CASES[family][variant]
