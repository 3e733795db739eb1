"""Quantised checkpoints made from the definition of each format in plain numpy, and the plain tensors that they stand for.

Nothing here knows the code that reads them: integers are packed bit by bit, and what is expected is computed from the integers themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

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


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers of a row side by side in 32-bit words, lowest bits first; the last word is filled with zeros."""
    words = np.zeros((values.shape[0], -(-values.shape[1] * bits // 32)), np.uint64)
    for position in range(values.shape[1]):
        words[:, position * bits // 32] |= values[:, position].astype(np.uint64) << np.uint64(position * bits % 32)
    return words.astype(np.uint32)


def int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def rounded(values: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """Stored in a smaller type, and as fp32 again."""
    stored = torch.from_numpy(values).to(dtype)
    return stored, stored.float().numpy()


def integers(
    weight: np.ndarray, bits: int, block: tuple[int, int], *, symmetric: bool, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, torch.Tensor, np.ndarray]:
    """Unsigned integers and zero points, scales as stored and in fp32; one zero and one scale for each block."""
    top, bottom = block_extreme(weight, block, np.max), block_extreme(weight, block, np.min)
    if symmetric:
        stored, scale = rounded(np.maximum(np.abs(top), np.abs(bottom)) / (2 ** (bits - 1) - 0.5), dtype)
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        stored, scale = rounded((top - bottom) / (2**bits - 1), dtype)
        zero = np.clip(np.round(-bottom / scale), 0, 2**bits - 1).astype(np.int64)
    spread = [expand(grid, block, weight.shape) for grid in (zero, scale)]
    return np.clip(np.round(weight / spread[1]) + spread[0], 0, 2**bits - 1).astype(np.int64), zero, stored, scale


def compressed_integers(
    module: str,
    weight: np.ndarray,
    *,
    bits: int = 4,
    block: tuple[int, int] = (1, 24),
    symmetric: bool = True,
    packed: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    scale_shape: tuple[int, ...] | None = None,
    shuffled: bool = False,
) -> Made:
    """shuffled: the columns of a group lie anywhere, as ``weight_g_idx`` says."""
    columns = np.random.default_rng(3).permutation(weight.shape[1]) if shuffled else np.arange(weight.shape[1])
    codes, zero, stored_scale, scale = integers(weight[:, columns], bits, block, symmetric=symmetric, dtype=scale_dtype)
    expected = (codes - expand(zero, block, weight.shape)).astype(np.float32) * expand(scale, block, weight.shape)
    back = np.argsort(columns)
    codes, expected = codes[:, back], expected[:, back]
    offset = 2 ** (bits - 1)
    stored: Tensors = {"weight_scale": stored_scale if scale_shape is None else stored_scale.reshape(scale_shape)}
    if packed:
        stored |= {"weight_packed": int32(pack(codes, bits)), "weight_shape": torch.tensor(weight.shape)}
        stored |= {} if symmetric else {"weight_zero_point": int32(pack(zero.T, bits).T)}
    else:
        stored |= {"weight": torch.from_numpy((codes - offset).astype(np.int8))}
        stored |= {} if symmetric else {"weight_zero_point": torch.from_numpy((zero - offset).astype(np.int8))}
    if shuffled:
        stored["weight_g_idx"] = torch.from_numpy((back // block[1]).astype(np.int32))
    named = {f"{module}.{name}": tensor for name, tensor in stored.items()}
    return Made(named, expected, f"{module}.weight", [name for name in named if not name.endswith((".weight", ".weight_packed"))])


def gptq_weight(
    module: str,
    weight: np.ndarray,
    *,
    bits: int = 4,
    group: int = 24,
    version: int = 1,
    symmetric: bool = False,
    order: bool = False,
    index: bool = True,
) -> Made:
    """order: the inputs of a group lie anywhere. index: ``g_idx`` is stored."""
    inputs = np.random.default_rng(4).permutation(weight.shape[1]) if order else np.arange(weight.shape[1])
    size = weight.shape[1] if group == -1 else group
    codes, zero, stored_scale, scale = integers(weight[:, inputs], bits, (1, size), symmetric=symmetric, dtype=torch.float16)
    expected = (codes - expand(zero, (1, size), weight.shape)).astype(np.float32) * expand(scale, (1, size), weight.shape)
    back = np.argsort(inputs)
    zeros = pack(zero.T, bits)
    if version == 1:
        zeros = zeros - np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    stored = {"qweight": int32(pack(codes[:, back], bits).T), "qzeros": int32(zeros), "scales": stored_scale.T}
    if index:
        stored["g_idx"] = torch.from_numpy((back // size).astype(np.int32))
    scales = [f"{module}.{name}" for name in ("qzeros", "scales", *(["g_idx"] if order else []))]
    return Made({f"{module}.{name}": tensor for name, tensor in stored.items()}, expected[:, back], f"{module}.weight", scales)


def awq_weight(module: str, weight: np.ndarray, *, group: int = 24) -> Made:
    size = weight.shape[1] if group == -1 else group
    codes, zero, stored_scale, scale = integers(weight, 4, (1, size), symmetric=False, dtype=torch.float16)
    expected = (codes - expand(zero, (1, size), weight.shape)).astype(np.float32) * expand(scale, (1, size), weight.shape)
    places = [8 * word + place for word in range(weight.shape[0] // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    stored = {"qweight": int32(pack(codes.T[:, places], 4)), "qzeros": int32(pack(zero.T[:, places], 4)), "scales": stored_scale.T}
    return Made(
        {f"{module}.{name}": tensor for name, tensor in stored.items()}, expected, f"{module}.weight", [f"{module}.qzeros", f"{module}.scales"]
    )


def coded_weight(module: str, weight: np.ndarray, *, kind: str = "nf4", block: int = 64, nested: bool = False) -> Made:
    """bitsandbytes of 4 bits; nested: double quantisation, by a table of its own."""
    random = np.random.default_rng(5)
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)
    flat = np.zeros(-(-weight.size // block) * block, np.float32)
    flat[: weight.size] = weight.ravel()
    largest = np.abs(flat.reshape(-1, block)).max(1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored: Tensors = {}
    if nested:
        values, size = np.sort(random.uniform(-1, 1, 256)).astype(np.float32), 256
        offset = float(np.float32(largest.mean()))
        outer = np.array([np.abs(largest[i : i + size] - offset).max() for i in range(0, len(largest), size)], np.float32)
        scaled = (largest - np.float32(offset)) / np.repeat(outer, size)[: len(largest)]
        bytes_ = np.abs(scaled[:, None] - values).argmin(1).astype(np.uint8)
        largest = values[bytes_] * np.repeat(outer, size)[: len(largest)] + np.float32(offset)
        state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
        stored = {"absmax": torch.from_numpy(bytes_), "nested_absmax": torch.from_numpy(outer), "nested_quant_map": torch.from_numpy(values)}
    else:
        stored = {"absmax": torch.from_numpy(largest)}
    spread = np.repeat(largest, block)
    codes = np.abs((flat / spread)[:, None] - table).argmin(1)[: weight.size].astype(np.uint8)
    expected = (table[codes] * spread[: weight.size]).reshape(weight.shape)
    stored |= {
        "quant_map": torch.from_numpy(table),
        f"quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    name = f"{module}.weight"
    scales = {f"{name}.{part}": tensor for part, tensor in stored.items()}
    return Made({name: torch.from_numpy(codes[::2] * 16 + codes[1::2])[:, None], **scales}, expected, name, list(scales))


def microscaled_weight(module: str, weight: np.ndarray) -> Made:
    """weight: ``[experts, inputs, outputs]``."""
    name = module if "experts." in module else module.replace("down_proj", "experts.gate_up_proj")
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    blocks = weight.transpose(0, 2, 1).reshape(weight.shape[0], weight.shape[2], -1, 32)
    exponents = (np.floor(np.log2(np.abs(blocks).max(-1))) - 2).astype(np.int64)
    exponents[0, 0, 0] = -120  # as small as bf16 can be
    scale = np.exp2(exponents.astype(np.float64)).astype(np.float32)[..., None]
    codes = np.abs((blocks / scale)[..., None] - table).argmin(-1).astype(np.uint8)
    expected = (table[codes] * scale).reshape(weight.shape[0], weight.shape[2], weight.shape[1]).transpose(0, 2, 1)
    stored = {
        f"{name}_blocks": torch.from_numpy(codes[..., ::2] + 16 * codes[..., 1::2]),
        f"{name}_scales": torch.from_numpy((exponents + 127).astype(np.uint8)),
    }
    return Made(stored, expected, name, [f"{name}_scales"])


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
FP4 = (
    0.0,
    0.005208333,
    0.6666667,
    1.0,
    0.33333334,
    0.5,
    0.16666667,
    0.25,
    -0.0,
    -0.005208333,
    -0.6666667,
    -1.0,
    -0.33333334,
    -0.5,
    -0.16666667,
    -0.25,
)


def compressed(form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors with one group of linear layers."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 24, "actorder": None, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "config_groups": {"group_0": group}}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 24, "desc_act": False, "sym": False, "lm_head": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 24, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
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
    "compressed-int4-groups": Case(compressed(), compressed_integers, (60, 72)),
    "compressed-int4-groups-zero-points": Case(compressed(symmetric=False), compressed_integers, (60, 72), {"symmetric": False}),
    "compressed-int4-rows-ragged-words": Case(
        compressed(strategy="channel", symmetric=False), compressed_integers, (43, 61), {"block": (1, 61), "symmetric": False}
    ),
    "compressed-int4-one-scale": Case(
        compressed(strategy="tensor"), compressed_integers, (24, 40), {"block": (24, 40), "scale_shape": (1,)}, "float32"
    ),
    "compressed-int4-shuffled": Case(
        compressed(symmetric=False, actorder="group"), compressed_integers, (60, 72), {"symmetric": False, "shuffled": True}
    ),
    "compressed-int8-packed": Case(compressed(num_bits=8), compressed_integers, (60, 72), {"bits": 8, "scale_dtype": torch.float16}, "float16"),
    "compressed-int8-rows": Case(
        compressed("int-quantized", num_bits=8, strategy="channel", group_size=None),
        compressed_integers,
        (60, 71),
        {"bits": 8, "block": (1, 71), "packed": False},
    ),
    "compressed-int8-zero-points": Case(
        compressed("int-quantized", num_bits=8, strategy="group", symmetric=False),
        compressed_integers,
        (60, 72),
        {"bits": 8, "packed": False, "symmetric": False},
    ),
    "compressed-fp8-one-scale": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        fp8_weight,
        (60, 72),
        {"block": None, "scale_shape": (1,), "suffix": "weight_scale", "scale_dtype": "bfloat16", "extra": ("input_scale",)},
    ),
    "compressed-fp8-rows": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8_weight,
        (60, 72),
        {"block": (1, 72), "suffix": "weight_scale"},
    ),
    "compressed-fp8-blocks": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
        fp8_weight,
        (60, 72),
        {"block": (16, 32), "suffix": "weight_scale", "scale_dtype": "bfloat16"},
    ),
    "gptq": Case({**GPTQ, "sym": True}, gptq_weight, (56, 72), {"symmetric": True}, "float16"),
    "gptq-zero-points": Case(GPTQ, gptq_weight, (56, 72), {}, "float16"),
    "gptq-second-version": Case({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq_weight, (56, 72), {"version": 2, "index": False}),
    "gptq-activation-order": Case({**GPTQ, "desc_act": True}, gptq_weight, (56, 72), {"order": True}),
    "gptq-8-bits-one-group": Case({**GPTQ, "bits": 8, "group_size": -1}, gptq_weight, (56, 72), {"bits": 8, "group": -1}, "float16"),
    "gptq-2-bits": Case({**GPTQ, "bits": 2}, gptq_weight, (64, 96), {"bits": 2}),
    "awq": Case(AWQ, awq_weight, (56, 72), {}, "float16"),
    "awq-one-group": Case({**AWQ, "group_size": -1, "version": "GEMM"}, awq_weight, (64, 40), {"group": -1}),
    "nf4": Case(BNB, coded_weight, (60, 72)),
    "nf4-double": Case({**BNB, "bnb_4bit_use_double_quant": True}, coded_weight, (130, 192), {"nested": True}),
    "nf4-other-blocks": Case(BNB, coded_weight, (31, 34), {"block": 128}, "float32"),
    "fp4": Case({**BNB, "bnb_4bit_quant_type": "fp4"}, coded_weight, (60, 72), {"kind": "fp4"}, "float16"),
    "mxfp4": Case({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, microscaled_weight, (3, 96, 20)),
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


def quantise_checkpoint(plain: Path, target: Path, case: str) -> Path:
    """A checkpoint with every projection quantised as a case says; the plain one gets the values that these stand for."""
    shutil.copytree(plain, target)
    config = json.loads((plain / "config.json").read_text())
    stored: Tensors = {}
    values: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")) and (case != "mxfp4" or tensor.dim() == 3):
            made = CASES[case].made(name.removesuffix(".weight"), tensor.float().numpy())
            stored |= made.stored
            values[name] = torch.from_numpy(made.expected).to(tensor.dtype)
        else:
            stored[name] = values[name] = tensor.clone()
    write(target, stored, {**CASES[case].settings, "modules_to_not_convert": ["lm_head"]}, **config)
    write(plain, values, None, **config)
    return target
