"""Made the files beside it, once: weights quantised and dequantised by the libraries themselves. Run where they are installed, not by a test.

    python make.py AUTOAWQ AUTO_GPTQ      # unpacked sources of autoawq 0.2.9 and auto-gptq 0.7.1; of both, modules that need no GPU

compressed-tensors was 0.20.0, bitsandbytes 0.50.2. A file has, for each case, its ``quantization_config`` and dtype (metadata), the stored
tensors ``CASE|NAME``, and ``CASE|`` the dequantised weight.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def compressed_tensors() -> dict[str, Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "int4-groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}),
        "int4-groups-zero-points": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}),
        "int4-rows-zero-points": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        "int8-packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8-rows": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8-one-scale-zero-point": ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
        "fp8-one-scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "fp8-rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8-blocks": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}),
    }
    found = {}
    for name, (form, options) in kinds.items():
        args = QuantizationArgs(**options)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        whole = weight(44, 80).bfloat16()
        low, high = extremes(whole, options)
        scale, zero = calculate_qparams(low, high, args)
        state = {"weight": whole, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        group = {"group_0": {"targets": ["Linear"], "weights": {**args.model_dump(mode="json")}}}
        settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": group}
        plain = compressor.decompress(stored, scheme)["weight"]
        stored.pop("weight_zero_point" if args.symmetric else "", None)
        found[name] = (settings, {f"x.{key}": value for key, value in stored.items()}, plain)
    return found


def extremes(whole: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest value of what shares a scale."""
    rows, columns = whole.shape
    size = {"group": (1, options.get("group_size", 1)), "channel": (1, columns), "tensor": (rows, columns)}.get(options["strategy"], (16, 32))
    padded = torch.nn.functional.pad(whole, (0, -columns % size[1], 0, -rows % size[0]))
    blocks = padded.reshape(padded.shape[0] // size[0], size[0], padded.shape[1] // size[1], size[1])
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return (low.reshape(1), high.reshape(1)) if options["strategy"] == "tensor" else (low, high)


def bitsandbytes() -> dict[str, Case]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    found = {}
    for name, kind, double, dtype, rows in (
        ("nf4", "nf4", False, torch.bfloat16, 44),
        ("nf4-double", "nf4", True, torch.bfloat16, 210),  # more than one block of magnitudes
        ("nf4-double-fp32", "nf4", True, torch.float32, 44),
        ("nf4-double-fp16", "nf4", True, torch.float16, 44),
        ("fp4", "fp4", False, torch.bfloat16, 44),
    ):
        packed, state = quantize_4bit(weight(rows, 82).to(dtype), blocksize=64, compress_statistics=double, quant_type=kind)
        stored = {"x.weight": packed, **{f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
        found[name] = (settings, stored, dequantize_4bit(packed, state))
    return found


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def autoawq(source: Path) -> dict[str, Case]:
    dequantize = module_of(source / "awq" / "utils" / "packing_utils.py").dequantize_gemm
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(-(2**31), 2**31, (64, 5), generator=generator).int()
    zeros = torch.randint(-(2**31), 2**31, (4, 5), generator=generator).int()
    scales = torch.rand(4, 40, generator=generator).half()
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    return {"awq": (settings, {"x.qweight": words, "x.qzeros": zeros, "x.scales": scales}, dequantize(words, zeros, scales, 4, 16).T)}


def auto_gptq(source: Path) -> dict[str, Case]:
    linear_of = module_of(source / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda.py").QuantLinear
    found = {}
    for name, bits, group, order in (("4-bits", 4, 32, False), ("activation-order", 4, 32, True), ("8-bits", 8, 64, False), ("2-bits", 2, 32, False)):
        linear = torch.nn.Linear(128, 32, bias=False)
        linear.weight.data = weight(32, 128)
        index = torch.arange(128) // group
        index = index[torch.randperm(128, generator=torch.Generator().manual_seed(3))] if order else index
        values = torch.stack([linear.weight.data[:, index == one] for one in range(128 // group)], 1)
        low, high = values.amin(2), values.amax(2)
        scales = (high - low) / (2**bits - 1)
        zeros = torch.round(-low / scales).clamp(1, 2**bits - 1)
        packed = linear_of(bits, group, 128, 32, False, weight_dtype=torch.float32)
        linear.weight.data, scales = linear.weight.data.half().float(), scales.half().float()
        packed.pack(linear, scales, zeros, index.int())
        settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False}
        stored = {f"x.{key}": getattr(packed, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        packed.autogptq_cuda_available = False
        found[name] = (settings, stored, packed(torch.eye(128)).T.detach())
    return found


def save(name: str, cases: dict[str, Case]) -> None:
    tensors, notes = {}, {}
    for case, (settings, stored, plain) in cases.items():
        notes[case] = {"settings": settings, "dtype": str(plain.dtype).removeprefix("torch.")}
        tensors |= {f"{case}|{key}": value.contiguous().clone() for key, value in {**stored, "": plain}.items()}
    save_file(tensors, HERE / f"{name}.safetensors", {"cases": json.dumps(notes)})


if __name__ == "__main__":
    save("compressed_tensors", compressed_tensors())
    save("bitsandbytes", bitsandbytes())
    save("autoawq", autoawq(Path(sys.argv[1])))
    save("auto_gptq", auto_gptq(Path(sys.argv[2])))
