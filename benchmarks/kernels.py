"""Times of the operators of mswift.kernels beside their peers and beside the bare matrix products that they cannot do without.

All methods of a case run in turn, round after round, in one process; a ratio is the median of the rounds' ratios. With one thread the time is
the process's CPU time, with more it is the wall's. The last line is JSON: rows of ``name, threads, ours_s, peer, peer_s, ratio, limit_s,
limit_ratio, extra_mib`` (ratio: peer / ours; limit_ratio: limit / ours, 1.0 where nothing but the products takes time), for what only moves
memory also ``ours_gb_s, limit_gb_s``, that of ours and of a copy of as many bytes.

With --launched all of them run with the settings of memory that the launcher gives a training process.

Usage: python benchmarks/kernels.py [--only head/small lora] [--rounds 7] [--threads 1 2] [--no-compile] [--launched] [--memory] [--slow-peers]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import kernels_experts
import kernels_more

from mswift.launch import MALLOC

Methods = dict[str, Callable[[], Any]]
SMALL, LARGE = (2048, 576, 49_152), (1024, 2048, 151_936)
BLOCK = 4096


# ---- linear + cross entropy ----------------------------------------------------------------------------------------------------------


def head(shape: tuple[int, int, int], trained: bool, labelled: float, compiled: bool, dtype: str = "bfloat16", slow_peers: bool = False) -> Methods:
    """Forward and backward of the loss of a head."""
    import torch
    from torch import nn

    from mswift.kernels.linear_cross_entropy import linear_cross_entropy

    tokens, width, vocab = shape
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, width, generator=generator).to(kind).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).mul_(0.03).to(kind).requires_grad_(trained)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) >= labelled] = -100

    def step(loss: Callable[..., Any]) -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()

    def eager(x: Any, w: Any, y: Any) -> Any:
        return nn.functional.cross_entropy((x @ w.t()).float(), y, ignore_index=-100, reduction="sum")

    scored = hidden.detach()[labels != -100].contiguous()
    rows, count, fixed = torch.empty(len(scored) * BLOCK, dtype=hidden.dtype), len(scored), weight.detach()
    to_hidden, to_weight = torch.empty_like(scored), torch.empty(BLOCK, width, dtype=hidden.dtype)

    def products() -> None:
        for start in range(0, vocab, BLOCK):
            part = fixed[start : start + BLOCK]
            logits = rows[: count * len(part)].view(count, len(part))
            torch.mm(scored, part.t(), out=logits)
            torch.mm(logits, part, out=to_hidden)
            if trained:
                torch.mm(logits.t(), scored, out=to_weight[: len(part)])

    methods: Methods = {
        "ours": partial(step, lambda x, w, y: linear_cross_entropy(x, w, y).sum()),
        "limit": products,
        "eager, fp32 cross entropy": partial(step, eager),
    }
    if compiled:
        methods["torch.compile"] = partial(step, torch.compile(eager))
    if (shape == SMALL or slow_peers) and hasattr(nn.functional, "linear_cross_entropy"):  # on the large shape one step of it takes minutes
        methods["F.linear_cross_entropy"] = partial(step, lambda x, w, y: nn.functional.linear_cross_entropy(x, w, y, reduction="sum"))
    return methods


# ---- LoRA ----------------------------------------------------------------------------------------------------------------------------


def addmm(x: Any, weight: Any, lora_a: Any, lora_b: Any, scale: float, dropout: float) -> Any:
    """The adapter in plain torch, added in place to the products of the layer; the mask is stored."""
    import torch

    class Adapted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, lora_a: Any, lora_b: Any) -> Any:
            ctx.mask = torch.nn.functional.dropout(torch.ones_like(x), dropout) if dropout else None
            low = (x if ctx.mask is None else x * ctx.mask) @ lora_a.t()
            ctx.save_for_backward(x, lora_a, lora_b, low)
            return (x @ weight.t()).addmm_(low, lora_b.t(), alpha=scale)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            x, lora_a, lora_b, low = ctx.saved_tensors
            (grad,), mask = grads, ctx.mask
            grad_low = (grad @ lora_b).mul_(scale)
            grad_x = grad @ weight
            grad_x = grad_x.addmm_(grad_low, lora_a) if mask is None else grad_x.addcmul_(grad_low @ lora_a, mask)
            return grad_x, grad_low.t() @ (x if mask is None else x * mask), (grad.t() @ low).mul_(scale)

    return Adapted.apply(x, lora_a, lora_b)


def lora(into: int, out: int, rank: int, dropout: float, dtype: str = "bfloat16") -> Methods:
    """Forward and backward of a frozen linear layer with an adapter, 1024 tokens; the limit is the layer without the adapter."""
    import torch
    from torch import nn

    from mswift.kernels.lora_linear import lora_linear

    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    x = torch.randn(1024, into, generator=generator).to(kind).requires_grad_()
    upstream = torch.randn(1024, out, generator=generator).to(kind)
    weight = torch.randn(out, into, generator=generator).mul_(into**-0.5).to(kind)
    lora_a = torch.randn(rank, into, generator=generator).mul_(into**-0.5).to(kind).requires_grad_()
    lora_b = torch.randn(out, rank, generator=generator).to(kind).requires_grad_()

    def step(function: Callable[..., Any]) -> None:
        x.grad = lora_a.grad = lora_b.grad = None
        function().backward(upstream)

    methods: Methods = {
        "ours": partial(step, lambda: lora_linear(x, weight, None, lora_a, lora_b, scale=2.0, dropout_p=dropout, seed=1)),
        "limit": partial(step, lambda: x @ weight.t()),
        "addmm_": partial(step, lambda: addmm(x, weight, lora_a, lora_b, 2.0, dropout)),
    }
    try:
        import peft
    except ImportError:
        return methods
    base = nn.ModuleDict({"layer": nn.Linear(into, out, bias=False, dtype=kind)})
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["layer"])
    layer = peft.get_peft_model(base, config).base_model.model["layer"].to(kind).train()
    methods["PEFT"] = partial(step, lambda: layer(x))
    return methods


# ---- between the products ------------------------------------------------------------------------------------------------------------


def fresh(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype)).requires_grad_()


class Copy:
    """A copy that reads and writes as many bytes as an operator must: `values` of a dtype."""

    def __init__(self, values: int, dtype: Any) -> None:
        import torch

        self.source, self.target = (torch.zeros(values // 2, dtype=dtype) for _ in range(2))
        self.bytes = 2 * self.source.nbytes

    def __call__(self) -> None:
        self.target.copy_(self.source)


def both_ways(inputs: list[Any], ours: Callable[..., Any], eager: Callable[..., Any], compiled: bool, touched: int) -> Methods:
    """Forward and backward of an operator; the limit is a copy of as many bytes as it must read and write, `touched` values."""
    import torch

    def outputs(function: Callable[..., Any]) -> tuple[Any, ...]:
        found = function(*inputs)
        return found if isinstance(found, tuple) else (found,)

    pull = tuple(map(torch.ones_like, outputs(eager)))

    def step(function: Callable[..., Any]) -> None:
        torch.autograd.grad(outputs(function), inputs, pull)

    methods: Methods = {"ours": partial(step, ours), "limit": Copy(touched, inputs[0].dtype), "eager": partial(step, eager)}
    return {**methods, "torch.compile": partial(step, torch.compile(eager))} if compiled else methods


def norm(dtype: str, compiled: bool) -> Methods:
    """1024 tokens of 576: x -> y, and (y's gradient, x) -> x's."""
    import torch
    from torch.nn import functional as F

    from mswift.kernels.elementwise import rms_norm

    x, weight = fresh(1024, 576, dtype=dtype), torch.ones(576, dtype=getattr(torch, dtype))
    return both_ways([x], lambda x: rms_norm(x, weight, 1e-5), lambda x: F.rms_norm(x, (576,), weight, 1e-5), compiled, 5 * x.numel())


def norm_of_a_sum(dtype: str, compiled: bool) -> Methods:
    """The same with the residual's addition in front; both the norm and the sum are used."""
    import torch
    from torch.nn import functional as F

    from mswift.kernels.elementwise import add_rms_norm

    x, residual, weight = fresh(1024, 576, dtype=dtype), fresh(1024, 576, dtype=dtype), torch.ones(576, dtype=getattr(torch, dtype))

    def eager(x: Any, residual: Any) -> Any:
        total = x + residual
        return F.rms_norm(total, (576,), weight, 1e-5), total

    return both_ways([x, residual], lambda x, r: tuple(add_rms_norm(x, r, weight, 1e-5)), eager, compiled, 8 * x.numel())


def gate(dtype: str, compiled: bool) -> Methods:
    """1024 tokens, 1536 gates and as many values."""
    from torch.nn import functional as F

    from mswift.kernels.elementwise import gated_activation

    x = fresh(1024, 3072, dtype=dtype)
    return both_ways([x], gated_activation, lambda x: F.silu(x[:, :1536]) * x[:, 1536:], compiled, 4 * x.numel())


def rotation(dtype: str, compiled: bool) -> Methods:
    """512 x 2 tokens, 9 heads of 64, in halves."""
    import torch

    from mswift.kernels.elementwise import rotate

    x, angles = fresh(512, 2, 9, 64, dtype=dtype), torch.randn(512, 32)
    table = torch.stack((angles.cos(), angles.sin()))

    def eager(x: Any) -> Any:  # as transformers does it, in the dtype of the values
        cos, sin = (part.repeat(1, 2)[:, None, None].to(x.dtype) for part in table)
        return x * cos + torch.cat((-x[..., 32:], x[..., :32]), dim=-1) * sin

    return both_ways([x], lambda x: rotate(x, table, interleaved=False), eager, compiled, 4 * x.numel())


def attention(dtype: str, packed: bool, compiled: bool) -> Methods:
    """Causal, 9 heads on 3 groups of 64: 2 rows of 512 tokens, or 8 rows of 128 end to end. The limit: its seven products on the tiles that are
    seen, as products of whole matrices."""
    import torch
    from torch.nn import functional as F

    from mswift.kernels.packed_attention import packed_attention

    rows, length = (8, 128) if packed else (2, 512)
    q, k, v = (fresh(rows * length, heads, 64, dtype=dtype) for heads in (9, 3, 3))
    bounds = torch.arange(rows + 1, dtype=torch.int32) * length

    def eager(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.view(rows, length, -1, 64).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)

    tiles = length // 64
    wide, seen = torch.zeros(576, 576, dtype=q.dtype), 7 * 9 * rows * tiles * (tiles + 1) // 2 * 64**3
    methods = both_ways([q, k, v], lambda q, k, v: packed_attention(q, k, v, bounds), eager, compiled, 2)
    out = torch.zeros(576, 576, dtype=q.dtype)

    def products() -> None:
        for _ in range(round(seen / 576**3)):
            torch.mm(wide, wide, out=out)

    return {**methods, "limit": products}


def cases(compiled: bool, slow_peers: bool = False) -> Iterator[tuple[str, Callable[[], Methods]]]:
    for name, shape in (("small", SMALL), ("large", LARGE)):
        for kind, trained in (("frozen", False), ("trained", True)):
            for labelled in (1.0, 0.4):
                yield f"head/{name}/{kind}/{labelled:.0%}", partial(head, shape, trained, labelled, compiled, slow_peers=slow_peers)
    for into, out in ((576, 1536), (2048, 8192)):
        for rank in (8, 16, 64):
            for dropout in (0.0, 0.1):
                yield f"lora/{into}x{out}/r{rank}/dropout{dropout}", partial(lora, into, out, rank, dropout)
    for dtype in ("bfloat16", "float32"):
        rows = {"norm": norm, "norm of a sum": norm_of_a_sum, "gate": gate, "rotation": rotation}
        for name, make in rows.items():
            yield f"rows/{name}/{dtype}", partial(make, dtype, compiled)
        for packed in (False, True):
            yield f"attention/{'8x128' if packed else '2x512'}/{dtype}", partial(attention, dtype, packed, compiled)
    yield from kernels_experts.cases(compiled)
    yield from kernels_more.cases(compiled)
    for kind, trained in (("frozen", False), ("trained", True)):
        yield f"fp32/head/small/{kind}", partial(head, SMALL, trained, 1.0, compiled, "float32")
    for into, out in ((576, 1536), (2048, 8192)):
        for dropout in (0.0, 0.1):
            yield f"fp32/lora/{into}x{out}/r16/dropout{dropout}", partial(lora, into, out, 16, dropout, "float32")


# ---- measuring -----------------------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any], threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def measure(name: str, make: Callable[[], Methods], threads: int, rounds: int) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(threads)
    methods = make()
    for function in methods.values():
        function()
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, function in methods.items():
            times[method].append(timed(function, threads))

    def ratio(method: str) -> float:
        return round(statistics.median(other / own for other, own in zip(times[method], times["ours"])), 3)

    middle = {method: round(statistics.median(values), 5) for method, values in times.items()}
    common: dict[str, Any] = {"name": name, "threads": threads, "ours_s": middle["ours"], "limit_s": middle["limit"], "limit_ratio": ratio("limit")}
    if isinstance(copy := methods["limit"], Copy):
        common |= {f"{method}_gb_s": round(copy.bytes / statistics.median(times[method]) / 1e9, 2) for method in ("ours", "limit")}
    peers = [method for method in methods if method not in ("ours", "limit")]
    return [{**common, "peer": peer, "peer_s": middle[peer], "ratio": ratio(peer)} for peer in peers] or [common]


def peak_of(name: str, compiled: bool, sender: Any) -> None:
    """In a process of its own: the highest resident memory of one step of ours above what was there before, in MiB, gradients included."""
    import torch

    torch.set_num_threads(2)
    methods = dict(cases(compiled))[name]()
    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf8")
    status = Path("/proc/self/status")

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text(encoding="utf8").splitlines() if line.startswith(field))

    before = kib("VmRSS")
    methods["ours"]()
    sender.send((kib("VmHWM") - before) / 1024)


def extra_memory(name: str) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_of, args=(name, False, sender))
    process.start()
    value = receiver.recv()
    process.join()
    return round(value, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names of cases")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--memory", action="store_true", help="measure the memory of ours too, in a process of its own")
    parser.add_argument("--slow-peers", action="store_true", help="F.linear_cross_entropy on the large shape too, minutes a step")
    parser.add_argument("--launched", action="store_true", help="with the launcher's settings of memory, for every method")
    options = parser.parse_args()
    if options.launched and MALLOC.keys() - os.environ.keys():  # they are read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**MALLOC, **os.environ})
    rows = []
    for name, make in cases(not options.no_compile, options.slow_peers):
        if not name.startswith(tuple(options.only)):
            continue
        extra = {"extra_mib": extra_memory(name)} if options.memory else {}
        for threads in options.threads:
            for row in measure(name, make, threads, options.rounds):
                rows.append({**row, **extra})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
