"""Model families: importing this package registers all of them."""

from __future__ import annotations

from mswift.families import llama, qwen2, qwen3
from mswift.families.base import MegatronDescription, ModelFamily, choose_dtype, families, find_family

__all__ = ["MegatronDescription", "ModelFamily", "choose_dtype", "families", "find_family", "llama", "qwen2", "qwen3"]
