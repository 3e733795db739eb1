"""In which dtype a product is computed: bf16 where the processor can, fp32 where it only stores bf16.

A CPU without AVX-512 has no fast bf16 product: torch's is 5 to 50 times slower there than fp32. Such products are computed in fp32 and
rounded once at the end, which is what bf16 hardware does as well (it accumulates in fp32).
"""

from __future__ import annotations

import torch
from torch import Tensor

_CAPABILITY = torch.backends.cpu.get_cpu_capability()  # asked here, because within a graph of torch.compile it cannot be


def cpu_multiplies_bf16() -> bool:
    """Whether torch has a vectorised bf16 product on this CPU (AVX-512, with or without AMX)."""
    return _CAPABILITY.startswith(("AVX512", "AMX"))


def needs_wide(tensor: Tensor) -> bool:
    """Whether products of `tensor` should be computed in fp32."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not cpu_multiplies_bf16()


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype in which its products are computed; itself where that is its own."""
    return tensor.float() if needs_wide(tensor) else tensor
