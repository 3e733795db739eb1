"""What a device offers to an engine: chosen once, asked everywhere else. Engine code has no `if cuda`."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from mswift.errors import ConfigError, LaunchError, one_line
from mswift.log import get_logger
from mswift.runtime import cpu

logger = get_logger(__name__)


@dataclass(frozen=True)
class Runtime:
    """One device kind: its torch device, its collective backend, and the megatron settings that it needs."""

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def transformer_settings(self, *, pp: int, vpp: int) -> dict[str, Any]:
        """TransformerConfig fields that depend on the device."""
        if not self.is_cuda:
            return cpu.transformer_settings(pp=pp, vpp=vpp)
        settings = {"use_cpu_initialization": False, "bias_dropout_fusion": True, "gradient_accumulation_fusion": False}
        return {**settings, "moe_token_dispatcher_type": "alltoall"}  # as on a CPU: micro batches of different length

    def check_settings(self, settings: dict[str, Any], *, tp: int, vpp: int) -> None:
        if not self.is_cuda:
            cpu.check_settings(settings, tp=tp, vpp=vpp)

    def memory_bytes(self) -> int:
        """Peak memory of this process so far: allocated GPU memory, or the resident set on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def release_freed(self) -> None:
        """Give freed memory that the allocator keeps back to the system or to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            return
        library = ctypes.CDLL(None)
        with contextlib.suppress(AttributeError):  # glibc alone has it
            library.malloc_trim(0)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def select(kind: str = "auto") -> Runtime:
    """The runtime for ``auto``, ``cpu`` or ``cuda``; installs the CPU services where they are needed.

    Raises:
        ConfigError: ``cuda`` where torch finds no CUDA device.
    """
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        raise ConfigError("--device cuda: torch finds no CUDA device here; install a CUDA build of torch, or use --device cpu")
    if kind == "cuda" or (kind == "auto" and available):
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; start at most one process per GPU")
        torch.cuda.set_device(local_rank)
        return Runtime(torch.device("cuda", local_rank), "nccl")
    cpu.install(force=kind == "cpu")
    return Runtime(torch.device("cpu"), "gloo")


def init_processes(runtime: Runtime, *, backend: str | None = None, timeout_s: float = 1800.0) -> None:
    """Join the world that torchrun or Slurm described in the environment, or make a world of one.

    Raises:
        LaunchError: the rendezvous failed. ConfigError: the backend is not one for this device.
    """
    if dist.is_initialized():
        return
    backend = backend or runtime.backend
    if backend == "nccl" and not runtime.is_cuda:
        raise ConfigError("--ddp_backend nccl: it joins GPUs, and this run is on the CPU; use gloo, or leave the flag out")
    timeout = timedelta(seconds=timeout_s)
    try:
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise LaunchError(
            f"cannot join the other processes at {where}: {one_line(error)}; check MASTER_ADDR, MASTER_PORT and that all started"
        ) from error


def leave_processes() -> None:
    """Take the process group down, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
