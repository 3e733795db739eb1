"""Quantised checkpoints made from the definition of each format in plain numpy, and the plain tensors that they stand for.

Nothing here knows the code that reads them: integers are packed bit by bit, and what is expected is computed from the integers themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
MODULE = "model.layers.0.mlp.down_proj"


@dataclass
class Made:
    """stored: the tensors of one quantised weight. plain: the name of the weight. expected: its values in fp32, before the last rounding."""

    stored: Tensors
    expected: np.ndarray
    plain: str = f"{MODULE}.weight"
    scales: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A format: ``quantization_config``, the dtype of the model, and what quantises a matrix of that shape."""

    settings: dict[str, Any]
    make: Callable[..., Made]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"

    def made(self, module: str = MODULE, weight: np.ndarray | None = None, seed: int = 0) -> Made:
        values = np.random.default_rng(seed).normal(0, 0.3, self.shape).astype(np.float32) if weight is None else weight
        return self.make(module, values, **self.options)


def expand(grid: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """A number for every element from one for every block."""
    return np.repeat(np.repeat(grid, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


def block_extreme(weight: np.ndarray, block: tuple[int, int], reduce: Callable[[np.ndarray], float]) -> np.ndarray:
    rows, columns = range(0, weight.shape[0], block[0]), range(0, weight.shape[1], block[1])
    return np.array([[reduce(weight[r : r + block[0], c : c + block[1]]) for c in columns] for r in rows], np.float32)


def to_fp8(values: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    stored = torch.from_numpy(values).to(dtype)
    return stored, stored.float().numpy()


def fp8_weight(
    module: str,
    weight: np.ndarray,
    *,
    block: tuple[int, int] | None = (128, 128),
    scale_shape: tuple[int, ...] | None = None,
    suffix: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: str = "float32",
    extra: tuple[str, ...] = (),
) -> Made:
    """block None: one scale for all. scale_shape: how the scales are stored, if not one for each block. extra: scales of activations."""
    size = block or weight.shape
    scale = block_extreme(np.abs(weight), size, np.max) / np.float32(448.0)
    stored_scale = torch.from_numpy(scale)
    if scale_dtype == "bfloat16":
        stored_scale = stored_scale.bfloat16()
        scale = stored_scale.float().numpy()
    elif scale_dtype in ("uint8", "e8m0"):
        exponent = np.ceil(np.log2(scale)).astype(np.int32)
        scale = np.exp2(exponent.astype(np.float64)).astype(np.float32)
        stored_scale = torch.from_numpy((exponent + 127).astype(np.uint8))
        stored_scale = stored_scale if scale_dtype == "uint8" else stored_scale.view(torch.float8_e8m0fnu)
    spread = expand(scale, size, weight.shape)
    bytes_, values = to_fp8(weight / spread, dtype)
    name = f"{module}.{suffix}"
    stored = {f"{module}.weight": bytes_, name: stored_scale if scale_shape is None else stored_scale.reshape(scale_shape)}
    stored |= {f"{module}.{entry}": torch.tensor(0.5) for entry in extra}
    return Made(stored, values * spread, f"{module}.weight", [name])


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CASES: dict[str, Case] = {
    "fp8-blocks": Case(FP8, fp8_weight, (256, 384)),
    "fp8-ragged-blocks": Case(FP8, fp8_weight, (200, 300)),
    "fp8-other-blocks": Case({**FP8, "weight_block_size": [16, 32]}, fp8_weight, (40, 70), {"block": (16, 32)}),
    "fp8-e5m2-bf16-scales": Case(FP8, fp8_weight, (256, 128), {"dtype": torch.float8_e5m2, "scale_dtype": "bfloat16"}),
    "fp8-power-of-two-bytes": Case({**FP8, "scale_fmt": "ue8m0"}, fp8_weight, (128, 256), {"scale_dtype": "uint8"}),
    "fp8-power-of-two-floats": Case({**FP8, "scale_fmt": "ue8m0"}, fp8_weight, (128, 256), {"scale_dtype": "e8m0"}),
    "fp8-one-scale": Case(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        fp8_weight,
        (50, 36),
        {"block": None, "scale_shape": (), "scale_dtype": "bfloat16", "extra": ("activation_scale",)},
    ),
    "fp8-one-scale-older-name": Case(
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8_weight,
        (50, 36),
        {"block": None, "scale_shape": (1,), "suffix": "weight_scale", "extra": ("input_scale", "k_scale")},
        "float16",
    ),
    "fp8-rows": Case({"quant_method": "fp8"}, fp8_weight, (50, 36), {"block": (1, 36), "suffix": "weight_scale"}, "float32"),
}


def write(directory: Path, tensors: Tensors, settings: dict[str, Any] | None, dtype: str | None = "bfloat16", **config: Any) -> Path:
    """A checkpoint directory of one file, written by the safetensors library."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"architectures": ["LlamaForCausalLM"], **config}
    content |= {} if settings is None else {"quantization_config": settings}
    content |= {} if dtype is None else {"dtype": dtype}
    (directory / "config.json").write_text(json.dumps(content))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory
