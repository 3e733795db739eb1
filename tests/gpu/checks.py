"""The CUDA operators on tensors against torch in float64. tests/gpu runs them on a device, tests/unit/kernels on the execution model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mswift.kernels import cuda_abi as abi
from mswift.kernels import cuda_grouped, cuda_head, cuda_linear, cuda_lora, cuda_rows
from mswift.kernels.cuda import Library

BF16 = torch.bfloat16


def some(device: str, *shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest value."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    largest = want.double().abs().max().item() if want.numel() else 0.0
    assert error <= tolerance * max(largest, 1e-30), f"{error} beside {largest}"


def rms_norm(library: Library, device: str) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (BF16, 5e-3)):
        x, residual, grad, grad_sum = (some(device, 6, 72, dtype=dtype, seed=i) for i in range(4))
        weight = some(device, 72, dtype=dtype)
        y, summed, rstd = cuda_rows.rms_norm(library, x, residual, weight, 1e-5, zero_centred=True)
        base, factor = summed.double().requires_grad_(), weight.double().requires_grad_()
        want = F.rms_norm(base, (72,), 1 + factor, 1e-5)
        close(summed, x.double() + residual.double(), tolerance)
        close(y, want.detach(), tolerance)
        grad_x, grad_weight = cuda_rows.rms_norm_backward(library, grad, grad_sum, summed, weight, rstd, zero_centred=True)
        want_x, want_weight = torch.autograd.grad(want, (base, factor), grad.double())
        close(grad_x, want_x + grad_sum.double(), tolerance)
        close(grad_weight, want_weight, 1e-5)


def gated(library: Library, device: str) -> None:
    inf = float("inf")
    acts: list[tuple[tuple[float, float, float, float], Callable[[Tensor, Tensor], Tensor]]] = [
        ((1.0, 0.0, inf, 0.0), lambda gate, up: F.silu(gate) * up),
        ((2 * (2 / torch.pi) ** 0.5, 0.044715, inf, 0.0), lambda gate, up: F.gelu(gate, approximate="tanh") * up),
        (
            (1.702, 0.0, 1.5, 1.0),
            lambda gate, up: gate.clamp(max=1.5) * torch.sigmoid(1.702 * gate.clamp(max=1.5)) * (up.clamp(-1.5, 1.5) + 1),
        ),
    ]
    for shape, act in acts:
        both, grad = some(device, 5, 80, dtype=torch.float32), some(device, 5, 40, dtype=torch.float32)
        wide = both.double().requires_grad_()
        want = act(*wide.chunk(2, -1))
        close(cuda_rows.gated(library, both, shape), want.detach(), 3e-6)
        (want_grad,) = torch.autograd.grad(want, wide, grad.double())
        close(cuda_rows.gated_backward(library, grad, both, shape), want_grad, 3e-6)


def rope(library: Library, device: str) -> None:
    fused = some(device, 7, 3 * 24, dtype=torch.float32)
    before = fused.clone()
    heads = fused[:, :48].view(7, 2, 24)
    angle = some(device, 7, 8, dtype=torch.float32)
    table = (angle.cos(), angle.sin())
    cuda_rows.rope(library, heads, heads, table, interleaved=False, sign=1)
    turned = before[:, :48].view(7, 2, 24)[..., :16]
    c, s = (part[:, None].repeat(1, 1, 2) for part in (angle.cos(), angle.sin()))
    half = torch.cat((-turned[..., 8:], turned[..., :8]), -1)
    close(heads[..., :16], turned * c + half * s, 1e-6)
    assert (fused[:, 48:] == before[:, 48:]).all()
    cuda_rows.rope(library, heads, heads, table, interleaved=False, sign=-1)
    close(fused, before, 1e-6)


def permute(library: Library, device: str) -> None:
    x, index = some(device, 10, 40), torch.tensor([[3, 1], [9, -1], [0, 4]], device=device)
    weights, grad = some(device, 3, 2, dtype=torch.float32).abs(), some(device, 3, 40)
    there = (index >= 0)[..., None]
    rows = x.double()[index.clamp_min(0)] * there
    close(cuda_rows.gather_rows(library, x, index.reshape(-1)), rows.reshape(6, 40), 1e-9)
    close(cuda_rows.combine_rows(library, x, index, weights), (rows * weights.double()[..., None]).sum(1), 5e-3)
    grad_x, grad_weights = cuda_rows.combine_rows_backward(library, grad, x, index, weights)
    want = torch.zeros(10, 40, device=device, dtype=torch.float64)
    want[index[index >= 0]] = (weights.double()[..., None] * grad.double()[:, None])[index >= 0]
    close(grad_x, want, 5e-3)
    close(grad_weights, (rows * grad.double()[:, None]).sum(-1), 1e-5)
    close(cuda_rows.column_sum(library, x, x), (x.double() ** 2).sum(0), 1e-5)


def lora(library: Library, device: str) -> None:
    """Both directions of a layer with DoRA's factor, against autograd with the mask that the kernels drew."""
    rows, inside, outside, rank, scale = 40, 48, 72, 8, 0.5
    x, weight, bias, a, b, grad = (
        some(device, *shape) for shape in ((rows, inside), (outside, inside), (outside,), (rank, inside), (outside, rank), (rows, outside))
    )
    column_scale = some(device, outside, dtype=torch.float32).abs() + 0.5
    mask = cuda_linear.Mask(64, 77, 5, 8, 8 + inside)
    eye = torch.eye(inside, device=device, dtype=BF16)
    drawn = torch.stack(
        [cuda_linear.lora_down(library, torch.ones(rows, inside, device=device, dtype=BF16), eye[i : i + 1], 1.0, mask)[:, 0] for i in range(inside)],
        1,
    )
    assert 0.6 < (drawn > 0).double().mean().item() < 0.9
    wide = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    want_low = scale * (wide[0] * drawn.double()) @ wide[1].T
    want = column_scale.double() * (wide[0] @ weight.double().T + want_low @ wide[2].T) + bias.double()
    low = cuda_linear.lora_down(library, x, a, scale, mask)
    close(low, want_low.detach(), 1e-2)
    close(cuda_linear.lora_forward(library, x, weight, bias, low, b, column_scale=column_scale), want.detach(), 1e-2)
    want_x, want_a, want_b = torch.autograd.grad(want, wide, grad.double())
    grad_low = cuda_linear.lora_grad_low(library, grad, b, scale, column_scale=column_scale)
    close(cuda_linear.lora_grad_input(library, grad, weight, grad_low, a, mask, column_scale=column_scale), want_x, 1e-2)
    close(cuda_linear.outer(library, grad_low, x, torch.float32, mask=mask), want_a, 1e-2)
    close(cuda_linear.outer(library, grad, low, BF16, column_scale=column_scale), want_b, 1e-2)


def experts(library: Library, device: str) -> None:
    offsets = torch.tensor([0, 5, 5, 20], device=device)
    x, weight, a, b, grad = some(device, 20, 32), some(device, 3, 40, 32), some(device, 3, 8, 32), some(device, 3, 40, 8), some(device, 20, 40)
    parts = [slice(0, 5), slice(5, 5), slice(5, 20)]
    low = cuda_linear.lora_down(library, x, a, 1.0, None, offsets)
    close(low, torch.cat([x[part].double() @ a[g].double().T for g, part in enumerate(parts)]), 1e-2)
    y = cuda_linear.lora_forward(library, x, weight, None, low, b, offsets=offsets)
    close(y, torch.cat([x[p].double() @ weight[g].double().T + low[p].double() @ b[g].double().T for g, p in enumerate(parts)]), 1e-2)
    grad_x = cuda_linear.lora_grad_input(library, grad, weight, None, None, None, offsets=offsets)
    close(grad_x, torch.cat([grad[part].double() @ weight[g].double() for g, part in enumerate(parts)]), 1e-2)
    grads = cuda_linear.outer(library, grad, x, torch.float32, offsets=offsets)
    close(grads, torch.stack([grad[part].double().T @ x[part].double() for part in parts]), 1e-5)


def grouped(library: Library, device: str) -> None:
    """What the operators of experts say: masks of each group that only keep or drop, an adapter in the same sums, biases, weights that lie apart."""
    counts, seeds = torch.tensor([5, 0, 15], device=device), torch.tensor([3, 4, 2**40], device=device)
    parts, limits = [slice(0, 5), slice(5, 5), slice(5, 20)], (seeds, 90, 4, 34)
    x, low, grad = some(device, 20, 32), some(device, 20, 8), some(device, 20, 40)
    weights, biases, ups = (list(some(device, 3, *shape).unbind()) for shape in ((40, 32), (40,), (40, 8)))
    apart = [weight.clone() for weight in weights]
    ones, eye = torch.ones(20, 32, device=device, dtype=BF16), [torch.eye(32, device=device, dtype=BF16)] * 3
    mask = cuda_grouped.product(library, ones, eye, counts, [], None, [], False, 1.0, *limits).double()
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    want = torch.cat([x[p].double() @ weights[g].double().T + low[p].double() @ ups[g].double().T + biases[g].double() for g, p in enumerate(parts)])
    for some_weights in (weights, apart):
        close(cuda_grouped.product(library, x, some_weights, counts, biases, low, ups, False, 1.0, None, 0, 0, 0), want, 1e-2)
    downs = [up.t().contiguous() for up in ups]  # [8, 40] by columns of an adapter's input
    back = cuda_grouped.product(library, grad, weights, counts, [], low, [down[:, :32].contiguous() for down in downs], True, 0.5, *limits)
    want = torch.cat([grad[p].double() @ weights[g].double() + mask[p] * (low[p].double() @ downs[g][:, :32].double()) for g, p in enumerate(parts)])
    close(back, 0.5 * want, 1e-2)
    grads = cuda_grouped.outer(library, grad, x, counts, *limits)
    close(grads, torch.stack([grad[p].double().T @ (x[p].double() * mask[p]) for p in parts]), 1e-2)


def adapted(library: Library, device: str) -> None:
    """Several adapters in one batch with DoRA's factor: what the operators of a linear layer say."""
    x, weight, a, b, grad = (some(device, *shape) for shape in ((9, 24), (40, 24), (6, 24), (40, 6), (9, 40)))
    factor, ids, none = some(device, 40, dtype=torch.float32).abs() + 0.5, torch.arange(9, device=device) % 4 - 1, [0] * 5
    own = (torch.arange(6, device=device) // 2 == ids[:, None]).double()
    out, low, inner = cuda_lora.linear(library, x, weight, None, a, b, factor, ids, 3, 0.5, none)
    want_low = 0.5 * own * (x.double() @ a.double().T)
    want = x.double() @ weight.double().T + want_low @ b.double().T
    close(low, want_low, 1e-2)
    close(inner, want, 1e-2)
    close(out, want * factor.double(), 1e-2)
    grad_x, grad_low = cuda_lora.grad_input(library, grad, weight, a, b, factor, ids, 3, 0.5, none, True)
    scaled = grad.double() * factor.double()
    want_low = 0.5 * own * (scaled @ b.double())
    close(grad_low, want_low, 1e-2)
    close(grad_x, scaled @ weight.double() + want_low @ a.double(), 1e-2)
    _, _, grad_factor = cuda_lora.grad_factors(library, grad, x, low, grad_low, factor, inner, none)
    close(grad_factor, (grad.double() * want).sum(0), 1e-2)
    mask = cuda_lora.drop(library, torch.ones(9, 24, device=device), [64, 7, 0, 0, 24])
    close(cuda_lora.drop(library, x, [64, 7, 0, 0, 24]), x.double() * mask.double(), 5e-3)


def quantised(library: Library, device: str) -> None:
    codes, scales = torch.randint(-127, 128, (24, 32), dtype=torch.int8).to(device), some(device, 24, dtype=torch.float32).abs() * 0.01
    how = cuda_linear.Quantised(abi.INT8, (24, 32), scales)
    weight = (codes.double() * scales.double()[:, None]).to(BF16).double()
    x, grad = some(device, 6, 32), some(device, 6, 24)
    close(cuda_linear.lora_forward(library, x, codes, None, None, None, quantised=how), x.double() @ weight.T, 1e-2)
    close(cuda_linear.lora_grad_input(library, grad, codes, None, None, None, quantised=how), grad.double() @ weight, 1e-2)
    low, up, bias = some(device, 6, 4), some(device, 24, 4), some(device, 24)
    given = (codes, scales, 24, 32, 0)
    want = x.double() @ weight.T + low.double() @ up.double().T + bias.double()
    close(cuda_lora.quantised_product(library, x, *given, bias, low, up, False, [0] * 5), want, 1e-2)
    down, one, nothing = some(device, 4, 32), torch.zeros(6, 24, device=device, dtype=BF16), torch.ones_like(codes)
    dropout = [90, 5, 0, 0, 32]
    mask = cuda_lora.drop(library, torch.ones(6, 32, device=device), dropout).double().clamp(max=1)
    got = cuda_lora.quantised_product(library, one, nothing, *given[1:], None, low, down, True, dropout)
    close(got, mask * (low.double() @ down.double()), 1e-2)


def head(library: Library, device: str) -> None:
    check_head(library, device, 40)


def wide_head(library: Library, device: str) -> None:
    """By groups of blocks that wait for each other."""
    check_head(library, device, 648)


def check_head(library: Library, device: str, width: int) -> None:
    """Statistics, averaged rows and the weight's gradient of a shard with padding, tokens whose label is elsewhere among them."""
    tokens, rows, valid, scale, cap = 9, 150, 143, 0.7 * (40 / width) ** 0.5, 4.0
    hidden, weight, bias = some(device, tokens, width), some(device, rows, width), some(device, rows)
    labels = torch.tensor([0, 142, -1, 7, 128, 5, 127, -1, 60], device=device)
    z = scale * (hidden.double() @ weight.double().T + bias.double())[:, :valid]
    z = cap * torch.tanh(z / cap)
    slope, here = 1 - (z / cap) ** 2, labels >= 0
    label = z.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    is_label = F.one_hot(labels.clamp_min(0), valid).bool() & here[:, None]
    limits = (valid, scale, cap)
    for gradient in (0, 1, 2):
        stats, mean, mean2 = cuda_head.linear_softmax(library, hidden, weight, bias, labels, *limits, gradient)
        distance = z - stats[0].double()[:, None]
        e = distance.exp().masked_fill(is_label, 0)
        close(stats[1], e.sum(1), 1e-5)
        close(stats[2], (e * distance).sum(1), 1e-5)
        close(stats[3][here], label[here], 1e-5)
        assert (stats[3][~here] == -torch.inf).all()
        for level, got, factor in ((1, mean, e), (2, mean2, e * distance)):
            want = (factor * slope) @ weight[:valid].double()
            close(got, want if gradient >= level else want[:0], 1e-2)
    factors = torch.stack((z.logsumexp(1), *torch.randn(3, tokens, generator=torch.Generator().manual_seed(1)).to(device))).float()
    lse, a, b, g = factors.double()[..., None]
    dz = ((z - lse).exp() * (a - b * z) + g * is_label) * slope * scale
    grad_weight, grad_bias = cuda_head.linear_softmax_grad_weight(library, hidden, weight, bias, labels, factors, *limits)
    close(grad_weight[:valid], dz.T @ hidden.double(), 1e-2)
    close(grad_bias[:valid], dz.sum(0), 1e-2)
    assert (grad_weight[valid:] == 0).all()
    assert (grad_bias[valid:] == 0).all()


CHECKS = {check.__name__: check for check in (rms_norm, gated, rope, permute, lora, adapted, experts, grouped, quantised, head, wide_head)}
