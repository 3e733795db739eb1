"""Model families: importing this package registers all of them."""

from __future__ import annotations

import importlib

from mswift.families.base import MegatronDescription, ModelFamily, choose_dtype, families, find_family, text_config

FAMILY_MODULES = (
    *("cohere", "deepseek", "dots1", "ernie4_5", "ernie4_5_moe", "gemma", "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoe", "hunyuan"),
    *("llama", "llama4", "minimax_m2", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmoe", "phi3", "phimoe", "qwen2", "qwen3"),
    *("qwen3_next", "qwen_moe", "seed_oss", "smollm3", "starcoder2"),
)
for _module in FAMILY_MODULES:
    importlib.import_module(f"mswift.families.{_module}")

__all__ = ["MegatronDescription", "ModelFamily", "choose_dtype", "families", "find_family", "text_config"]
