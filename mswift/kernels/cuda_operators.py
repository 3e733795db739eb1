"""The operators of csrc/ops.cpp on CUDA: each schema beside the function that runs it. What a kernel is not written for, a face has to refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mswift.kernels import cuda_grouped, cuda_head, cuda_lora, cuda_rows, extension
from mswift.kernels.cuda import Library, library, missing

KERNELS: dict[str, Callable[..., Any]] = {
    "linear_softmax": cuda_head.linear_softmax,
    "linear_softmax_grad_weight": cuda_head.linear_softmax_grad_weight,
    "lora_linear": cuda_lora.linear,
    "lora_linear_grad_input": cuda_lora.grad_input,
    "lora_linear_grad_factors": cuda_lora.grad_factors,
    "lora_dropout": cuda_lora.drop,
    "grouped_product": cuda_grouped.product,
    "grouped_outer": cuda_grouped.outer,
    "quantised_product": cuda_lora.quantised_product,
    "gather_rows": cuda_rows.gather,
    "combine_rows": cuda_rows.combine,
    "combine_rows_backward": cuda_rows.combine_backward,
    "rms_norm": cuda_rows.norm,
    "add_rms_norm": cuda_rows.add_norm,
    "rms_norm_backward": cuda_rows.norm_backward,
    "gated_activation": cuda_rows.gated_activation,
    "gated_activation_backward": cuda_rows.gated_activation_backward,
    "rotate": cuda_rows.rotate,
    "rotate_": cuda_rows.rotate_in_place,
}
"""Name of an operator -> its function, called with the library and with what the schema says."""


def hindrance(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> str | None:
    """Why the kernels do not take these tensors, all of one dtype; None: they do."""
    first = tensors[0].dtype
    if first not in dtypes or any(tensor.dtype != first for tensor in tensors):
        found = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        return f"the CUDA kernel takes {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {found}"
    return missing()


def _run(name: str, kernel: Callable[..., Any], provide: Callable[[], Library], *arguments: Any) -> Any:
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        where = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{name}: got tensors on several devices ({where}), wanted all on one")
    return kernel(provide(), *arguments)


def install(provide: Callable[[], Library] = library, key: str = "CUDA") -> torch.library.Library:
    """Make these the operators' kernels for a dispatch key; the library that comes with it is loaded at the first call.

    The kernels stay for as long as what is returned.
    """
    kernels = torch.library.Library("mswift", "IMPL")
    for name, kernel in KERNELS.items():
        kernels.impl(name, functools.partial(_run, name, kernel, provide), key)
    return kernels


_installed = install() if extension.available() else None
