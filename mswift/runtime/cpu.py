"""The CPU runtime: lets an unmodified megatron-core train on gloo by supplying the few torch.cuda services that it assumes.

This is the only module of the project that assigns onto another library's names. It does so when `install()` is called and at no
other time, refuses to where CUDA works, and can list every megatron call site that it served (`record_sites`), so that a new
megatron-core that needs one more is noticed.

Silent traps of megatron-core on gloo that are handled or refused here (see docs/cpu-runtime.md): interleaved pipelines whose messages
pair wrongly or are sent from freed memory, a fused cross entropy that rounds its gradient to bf16, uneven collectives, multi-latent
attention under tensor parallelism.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from mswift.errors import ConfigError, LaunchError
from mswift.log import get_logger
from mswift.runtime.precision import needs_wide, widen

TESTED_MEGATRON_VERSIONS = ("0.16.1", "0.19.2")
"""megatron-core releases that the whole test suite (the first) or its runtime part (the others) was run against."""

_UNBOUND_IN_MOE_UTILS = (
    "te_general_gemm",
    "fused_permute",
    "fused_unpermute",
    "fused_topk_with_score_function",
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_sort_chunks_by_index",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index_with_probs",
)

# The products that megatron-core's own layers call; ours ask `runtime.precision` themselves.
_PRODUCTS = frozenset({torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__, torch.nn.functional.linear})

logger = get_logger(__name__)
_CPU = torch.device("cpu")
_sites: set[tuple[str, str]] | None = None


def _served(what: str) -> None:
    """Note which line of megatron-core asked for `what`; only while `record_sites` is active."""
    if _sites is None:
        return
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "/megatron/core/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None:
        _sites.add((what, frame.f_code.co_filename.split("/megatron/core/")[1] + ":" + frame.f_code.co_name))


@contextlib.contextmanager
def record_sites() -> Iterator[set[tuple[str, str]]]:
    """Collect (service, ``file:function`` in megatron-core) pairs that the runtime serves inside the block."""
    global _sites
    found: set[tuple[str, str]] = set()
    _sites = found
    try:
        yield found
    finally:
        _sites = None


class _Event:
    """Stands in for torch.cuda.Event: everything before it has already happened."""

    def __init__(self, *_: object, **__: object) -> None:
        _served("Event")

    def record(self, *_: object) -> None: ...
    def wait(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: _Event) -> float:
        return 0.0


class _Stream:
    """Stands in for torch.cuda.Stream: there is one order of execution, the program's."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: object, **__: object) -> None:
        _served("Stream")

    def wait_stream(self, _stream: _Stream) -> None: ...
    def wait_event(self, _event: _Event) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


def _names_cuda(device: object) -> bool:
    return device.startswith("cuda") if isinstance(device, str) else isinstance(device, torch.device) and device.type == "cuda"


class _CpuServices(TorchFunctionMode):
    """While it is active: requests for CUDA memory get their CPU form, and bf16 products are computed as `runtime.precision` says."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                _served(f"device=cuda in {func.__name__}")
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                _served("pin_memory")
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            _served("Tensor.cuda")
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers accept "torch.cuda.FloatTensor" and its bf16 form by name.
            _served("Tensor.type")
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            _served("Tensor.to")
            args = (args[0], _CPU, *args[2:])
        if func in _PRODUCTS and any(isinstance(arg, torch.Tensor) and needs_wide(arg) for arg in args):
            args = tuple(widen(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
            return func(*args, **(kwargs or {})).to(torch.bfloat16)
        return func(*args, **(kwargs or {}))


def _service(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    def serve(*args: Any, **kwargs: Any) -> Any:
        _served(name)
        return answer(*args, **kwargs)

    serve.__name__ = name
    return serve


def _supply_torch_cuda() -> None:
    cuda = torch.cuda
    only_stream = _Stream()
    cuda.current_device = _service("current_device", lambda: "cpu")
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "reset_peak_memory_stats"):
        setattr(cuda, name, _service(name, lambda *_, **__: None))
    cuda.current_stream = _service("current_stream", lambda *_, **__: only_stream)
    cuda.default_stream = _service("default_stream", lambda *_, **__: only_stream)
    cuda.stream = _service("stream", lambda _stream: contextlib.nullcontext())
    cuda.Stream = _Stream  # type: ignore[assignment,misc]  # stays a class: transformers annotates with torch.cuda.Stream | None
    cuda.Event = _Event  # type: ignore[assignment,misc]
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _service(name, lambda *_, **__: 0))
    get_state = _service("get_rng_state", lambda device="cuda": torch.get_rng_state())
    set_state = _service("set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state))
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    cuda.manual_seed = _service("manual_seed", torch.manual_seed)


def _supply_collectives() -> None:
    """gloo has no uneven all_gather and reduce_scatter: broadcasts, and all_reduce followed by a slice."""
    even_all_gather, even_reduce_scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({tuple(t.shape) for t in tensor_list}) <= 1:
            return even_all_gather(tensor_list, tensor, group=group, async_op=async_op)
        _served("all_gather(uneven)")
        for out, source in zip(tensor_list, dist.get_process_group_ranks(group), strict=True):
            if source == dist.get_rank():
                out.copy_(tensor)
            dist.broadcast(out, source, group=group)
        return None

    def reduce_scatter(
        output: torch.Tensor, input_list: Sequence[torch.Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({tuple(t.shape) for t in input_list}) <= 1:
            return even_reduce_scatter(output, list(input_list), op, group, async_op)
        _served("reduce_scatter(uneven)")
        parts = [t.contiguous().clone() for t in input_list]
        for part in parts:
            dist.all_reduce(part, op, group=group)
        output.copy_(parts[dist.get_rank(group)])
        return None

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def _import_uncompiled() -> None:
    """Import megatron-core with its fusions as plain functions: torch.compile takes seconds to import and minutes to compile on CPU."""
    compiler = torch.compile
    torch.compile = lambda function, *_, **__: function  # type: ignore[assignment]
    try:
        from megatron.core import jit
    finally:
        torch.compile = compiler
    jit.disable_jit_fuser()


def _supply_megatron() -> None:
    """The three places inside megatron-core where a CPU tensor takes a wrong turn."""
    _import_uncompiled()
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        _served("_set_cuda_rng_state")
        torch.set_rng_state(new_state)

    random._set_cuda_rng_state = set_rng_state

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        _served("maybe_move_tensor_to_cpu")  # gloo's all_to_all wants lists: the original converts only CUDA tensors
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu
    # 0.16.1 leaves these unbound without Transformer Engine, and then reads them.
    for name in _UNBOUND_IN_MOE_UTILS:
        if name not in vars(moe_utils):
            setattr(moe_utils, name, None)


def _supply_zero_resume() -> None:
    """torch's AdamW keeps a step for every parameter, checkpoints keep one: hand the optimizer's own back where a load asks for it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_with_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        _served("DistributedOptimizer.step")
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**{name: state[name] for name in ("step",) if name in state}, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_with_step


_mode: _CpuServices | None = None


def installed() -> bool:
    return _mode is not None


def install(*, force: bool = False) -> None:
    """Supply the CPU services to this process; call before any megatron model is built. Doing it twice changes nothing.

    Args:
        force: install although CUDA is available (``--device cpu`` on a machine with a GPU).

    Raises:
        LaunchError: CUDA is available and `force` was not asked for.
    """
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_available() and not force:
        raise LaunchError("the CPU runtime was asked for on a machine where CUDA is available; use --device cuda, or --device cpu to insist")
    version = metadata.version("megatron-core")
    if version not in TESTED_MEGATRON_VERSIONS:
        logger.warning("megatron-core %s is not among the versions tested on CPU (%s)", version, ", ".join(TESTED_MEGATRON_VERSIONS))
    _supply_torch_cuda()
    _supply_collectives()
    _supply_megatron()
    _supply_zero_resume()
    _mode = _CpuServices()
    _mode.__enter__()


def transformer_settings(*, pp: int, vpp: int) -> dict[str, Any]:
    """TransformerConfig fields without which megatron-core fails, or is silently wrong, on CPU and gloo."""
    settings: dict[str, Any] = {
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,  # the native one rounds its gradient to bf16, in fp32 too
        "moe_token_dispatcher_type": "alltoall",  # the one that takes micro batches of different length
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
        "deallocate_pipeline_outputs": False,  # gloo may still be sending a buffer that this would free
    }
    if pp > 1 and vpp > 1:
        # With batched messages the previous and the next stage of a two-stage pipeline are one peer, and messages pair wrongly.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def check_settings(settings: dict[str, Any], *, tp: int, vpp: int) -> None:
    """Refuse what would run on CPU and be wrong, or cannot run.

    Raises:
        ConfigError: one line with the setting, why it is refused, and what to use.
    """
    faults = {
        "multi-latent attention with tensor parallelism has gradients that differ from one process; use tensor_model_parallel_size 1": (
            settings.get("multi_latent_attention", False) and tp > 1
        ),
        "cross_entropy_loss_fusion rounds the loss gradient to bf16; leave it off": settings.get("cross_entropy_loss_fusion", False),
        "moe_grouped_gemm needs a CUDA extension; leave it off": settings.get("moe_grouped_gemm", False),
        "interleaved pipelines need batch_p2p_comm off and deallocate_pipeline_outputs off on gloo": (
            vpp > 1 and (settings.get("batch_p2p_comm", True) or settings.get("deallocate_pipeline_outputs", True))
        ),
    }
    for fault, present in faults.items():
        if present:
            raise ConfigError(f"on CPU: {fault}")
