"""More cases of `benchmarks/kernels.py`: divergences of two heads, a head whose entropy is trained, LoRA with DoRA's factor or several adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

Methods = dict[str, Callable[[], Any]]
SHAPE = (1024, 576, 49_152)
BLOCK = 4096


def _draw(*shape: int, scale: float = 1.0, seed: int = 0, trained: bool = False) -> Any:
    import torch

    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().requires_grad_(trained)


def kl(kind: Any, trained: bool, compiled: bool) -> Methods:
    """Forward and backward of the divergence of a student's head from a frozen teacher's of the same shape; the limit is each product once."""
    import torch
    from torch.nn import functional as F

    from mswift.kernels.linear_kl import linear_kl

    tokens, width, vocab = SHAPE
    hidden, other = _draw(tokens, width, trained=True), _draw(tokens, width, seed=1)
    weight, other_weight = _draw(vocab, width, scale=0.06, trained=trained), _draw(vocab, width, scale=0.06, seed=1)

    def step(loss: Callable[..., Any]) -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight).backward()

    def eager(x: Any, w: Any) -> Any:
        p, q = (F.log_softmax((rows @ head.t()).float(), -1) for rows, head in ((x, w), (other, other_weight)))
        return F.kl_div(p, q, reduction="sum", log_target=True) if kind == "forward" else F.kl_div(q, p, reduction="sum", log_target=True)

    rows, fixed, fixed_hidden = torch.empty(tokens * BLOCK, dtype=hidden.dtype), weight.detach(), hidden.detach()
    to_hidden, to_weight = torch.empty_like(fixed_hidden), torch.empty(BLOCK, width, dtype=hidden.dtype)

    def products() -> None:
        for start in range(0, vocab, BLOCK):
            part, logits = fixed[start : start + BLOCK], rows.view(tokens, BLOCK)
            torch.mm(other, other_weight[start : start + BLOCK].t(), out=logits)
            torch.mm(fixed_hidden, part.t(), out=logits)
            torch.mm(logits, part, out=to_hidden)
            if trained:
                torch.mm(logits.t(), fixed_hidden, out=to_weight)

    methods: Methods = {
        "ours": partial(step, lambda x, w: linear_kl(x, w, other, other_weight, kind=kind).sum()),
        "limit": products,
        "eager, fp32 log_softmax": partial(step, eager),
    }
    return {**methods, "torch.compile": partial(step, torch.compile(eager))} if compiled else methods


def entropy(compiled: bool) -> Methods:
    """Forward and backward of log-probabilities and a differentiable entropy under a frozen head; the limit is three products: the averages of
    rows under p and under p log p are not multiples of each other."""
    import torch

    from mswift.kernels.linear_log_probs import linear_log_probs

    tokens, width, vocab = SHAPE
    hidden, weight = _draw(tokens, width, trained=True), _draw(vocab, width, scale=0.06)
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0))

    def step(loss: Callable[..., Any]) -> None:
        hidden.grad = None
        loss(hidden).backward()

    def ours(x: Any) -> Any:
        found = linear_log_probs(x, weight, labels, entropy_grad=True)
        return found.log_probs.sum() - 0.01 * found.entropy.sum()

    def eager(x: Any) -> Any:
        log_p = torch.log_softmax((x @ weight.t()).float(), -1)
        return log_p.gather(-1, labels[:, None]).sum() + 0.01 * (log_p.exp() * log_p).sum()

    rows, fixed = torch.empty(tokens, BLOCK, dtype=hidden.dtype), hidden.detach()
    into = torch.empty_like(fixed)

    def products() -> None:
        for start in range(0, vocab, BLOCK):
            torch.mm(fixed, weight[start : start + BLOCK].t(), out=rows)
            for _ in range(2):
                torch.mm(rows, weight[start : start + BLOCK], out=into)

    methods: Methods = {"ours": partial(step, ours), "limit": products, "eager": partial(step, eager)}
    return {**methods, "torch.compile": partial(step, torch.compile(eager))} if compiled else methods


def lora(into: int, out: int, adapters: int) -> Methods:
    """Forward and backward of a frozen layer, 1024 tokens, rank 16: with DoRA's factor, or with adapters of which each token has one."""
    import torch

    from mswift.kernels.lora_linear import lora_linear

    x, upstream, weight = _draw(1024, into, trained=True), _draw(1024, out), _draw(out, into, scale=into**-0.5)
    lora_a, lora_b = _draw(adapters, 16, into, scale=into**-0.5, trained=True), _draw(adapters, out, 16, trained=True)
    ids, factor = torch.arange(1024) % adapters, None
    if adapters == 1:
        lora_a, lora_b = (part.detach()[0].clone().requires_grad_() for part in (lora_a, lora_b))
        factor = _draw(out).float().requires_grad_()

    def step(function: Callable[[], Any]) -> None:
        for leaf in (x, lora_a, lora_b, factor):
            if leaf is not None:
                leaf.grad = None
        function().backward(upstream)

    def eager() -> Any:
        if factor is not None:
            return (x @ weight.t() + 2.0 * ((x @ lora_a.t()) @ lora_b.t())) * factor.bfloat16()
        low = torch.einsum("ti,ari->tar", x, lora_a) * torch.nn.functional.one_hot(ids, adapters)[:, :, None].to(x.dtype)
        return x @ weight.t() + 2.0 * torch.einsum("tar,aor->to", low, lora_b)

    def ours() -> Any:
        return lora_linear(x, weight, None, lora_a, lora_b, scale=2.0, factor=factor, adapter_ids=None if factor is not None else ids)

    return {
        "ours": partial(step, ours),
        "limit": partial(step, lambda: x @ weight.t()),
        "eager": partial(step, eager),
    }


def cases(compiled: bool) -> Iterator[tuple[str, Callable[[], Methods]]]:
    for kind in ("forward", "reverse"):
        for name, trained in (("frozen", False), ("trained", True)):
            yield f"kl/{kind}/{name}", partial(kl, kind, trained, compiled)
    yield "entropy/frozen", partial(entropy, compiled)
    yield "dora/576x1536/r16", partial(lora, 576, 1536, 1)
    for adapters in (2, 8):
        yield f"adapters{adapters}/576x1536/r16", partial(lora, 576, 1536, adapters)
