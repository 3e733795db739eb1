"""Times of the operators of mswift.kernels beside their peers and beside the bare matrix products that they cannot do without.

All methods of a case run in turn, round after round, in one process; a ratio is the median of the rounds' ratios. With one thread the time is
the process's CPU time, with more it is the wall's. The last line is JSON: rows of ``name, threads, ours_s, peer, peer_s, ratio, limit_s,
limit_ratio, extra_mib`` (ratio: peer / ours; limit_ratio: limit / ours, 1.0 where nothing but the products takes time).

Usage: python benchmarks/kernels.py [--only head/small lora] [--rounds 7] [--threads 1 2] [--no-compile]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Methods = dict[str, Callable[[], Any]]
SMALL, LARGE = (2048, 576, 49_152), (1024, 2048, 151_936)
BLOCK = 4096


# ---- linear + cross entropy ----------------------------------------------------------------------------------------------------------


def head(shape: tuple[int, int, int], trained: bool, labelled: float, compiled: bool) -> Methods:
    """Forward and backward of the loss of a head, bf16."""
    import torch
    from torch import nn

    from mswift.kernels.linear_cross_entropy import linear_cross_entropy

    tokens, width, vocab = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).mul_(0.03).bfloat16().requires_grad_(trained)
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
    if shape == SMALL and hasattr(nn.functional, "linear_cross_entropy"):  # on the large shape one step of it takes minutes
        methods["F.linear_cross_entropy"] = partial(step, lambda x, w, y: nn.functional.linear_cross_entropy(x, w, y, reduction="sum"))
    return methods


# ---- LoRA ----------------------------------------------------------------------------------------------------------------------------


def lora(into: int, out: int, rank: int, dropout: float) -> Methods:
    """Forward and backward of a frozen linear layer with an adapter, 1024 tokens, bf16; the limit is the layer without the adapter."""
    import torch
    from torch import nn

    from mswift.kernels.lora_linear import lora_linear

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, into, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(1024, out, generator=generator).bfloat16()
    weight = torch.randn(out, into, generator=generator).mul_(into**-0.5).bfloat16()
    lora_a = torch.randn(rank, into, generator=generator).mul_(into**-0.5).bfloat16().requires_grad_()
    lora_b = torch.randn(out, rank, generator=generator).bfloat16().requires_grad_()

    def step(function: Callable[..., Any]) -> None:
        x.grad = lora_a.grad = lora_b.grad = None
        function().backward(upstream)

    methods: Methods = {
        "ours": partial(step, lambda: lora_linear(x, weight, None, lora_a, lora_b, scale=2.0, dropout_p=dropout, seed=1)),
        "limit": partial(step, lambda: x @ weight.t()),
    }
    try:
        import peft
    except ImportError:
        return methods
    base = nn.ModuleDict({"layer": nn.Linear(into, out, bias=False, dtype=torch.bfloat16)})
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["layer"])
    layer = peft.get_peft_model(base, config).base_model.model["layer"].to(torch.bfloat16).train()
    methods["PEFT"] = partial(step, lambda: layer(x))
    return methods


def cases(compiled: bool) -> Iterator[tuple[str, Callable[[], Methods]]]:
    for name, shape in (("small", SMALL), ("large", LARGE)):
        for kind, trained in (("frozen", False), ("trained", True)):
            for labelled in (1.0, 0.4):
                yield f"head/{name}/{kind}/{labelled:.0%}", partial(head, shape, trained, labelled, compiled)
    for into, out in ((576, 1536), (2048, 8192)):
        for rank in (8, 16, 64):
            for dropout in (0.0, 0.1):
                yield f"lora/{into}x{out}/r{rank}/dropout{dropout}", partial(lora, into, out, rank, dropout)


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
    common = {"name": name, "threads": threads, "ours_s": middle["ours"], "limit_s": middle["limit"], "limit_ratio": ratio("limit")}
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
    options = parser.parse_args()
    rows = []
    for name, make in cases(not options.no_compile):
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
