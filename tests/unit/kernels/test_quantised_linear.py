"""Products with quantised weights: those of the dequantised weight, with bitsandbytes' layout, and without ever holding it as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mswift.kernels import choice, extension
from mswift.kernels import quantised_linear as module
from mswift.kernels.cuda_abi import Dropout
from mswift.kernels.dropout import threshold_of
from mswift.kernels.quantised_linear import NF4, Nested, QuantisedWeight, nested, quantise_int8, quantise_nf4, quantised_linear
from tests.unit.csrc import product_cases

SCALE, SEED = 1.7, 2**45 + 11
pytestmark = pytest.mark.usefixtures("auto_kernels")
needs_kernel = pytest.mark.skipif(not extension.isa_at_least("avx512_bf16"), reason="the compiled kernels are not there, or the CPU has no bf16")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised(kind: str, rows: int, columns: int) -> QuantisedWeight:
    weight = draw(rows, columns, seed=1) / columns**0.5
    return quantise_int8(weight) if kind == "int8" else quantise_nf4(weight, int(kind.removeprefix("nf4-")))


def by_hand(weight: QuantisedWeight) -> Tensor:
    """fp32, one element after the other."""
    rows, columns = weight.shape
    codes, scales = weight.codes.flatten().tolist(), weight.magnitudes.tolist()
    values = []
    for i in range(rows * columns):
        if weight.block:
            values.append(NF4[codes[i // 2] >> 4 if i % 2 == 0 else codes[i // 2] & 15] * scales[i // weight.block])
        else:
            values.append(codes[i] * scales[i // columns])
    return torch.tensor(values).view(rows, columns)


def inputs(tokens: int, weight: QuantisedWeight, rank: int) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        "x": draw(tokens, columns, seed=2),
        "bias": draw(rows, seed=3),
        "lora_a": draw(rank, columns, seed=4) / columns**0.5,
        "lora_b": draw(rows, rank, seed=5),
    }


def results(function: Any, given: dict[str, Tensor], dtype: torch.dtype, *, signed: bool = True) -> dict[str, Tensor]:
    """Output and gradients; without signs nothing cancels in them."""
    tensors = {name: (tensor if signed else tensor.abs()).bfloat16().to(dtype).requires_grad_() for name, tensor in given.items()}
    output = function(**tensors)
    pull = draw(*output.shape, seed=9).bfloat16().to(dtype)
    pull = pull if signed else pull.abs()
    return {"output": output.detach(), **dict(zip(tensors, torch.autograd.grad(output, list(tensors.values()), pull), strict=True))}


def distance(found: Tensor, wanted: Tensor, size: Tensor | None = None) -> float:
    """Relative to what is wanted, or to the `size` of what was added up for it: few numbers may cancel to nearly nothing."""
    return float((found.double() - wanted).norm() / (wanted if size is None else size).norm().clamp(min=1e-6))


KINDS = ["int8", "nf4-64", "nf4-32", "nf4-128"]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 30),
    rows=st.integers(1, 300),
    columns=st.integers(1, 12),
    kind=st.sampled_from(KINDS),
    rank=st.integers(1, 40),
    p=st.sampled_from([0.0, 0.3]),
    odd=st.booleans(),
)
def test_values_and_gradients(tokens: int, rows: int, columns: int, kind: str, rank: int, p: float, odd: bool) -> None:
    """Of float64 with the weight by hand, fp32 and bf16; `odd` numbers of columns, which plain torch takes alone."""
    weight = quantised(kind, rows, 2 * columns if odd else 16 * columns)
    whole, first = by_hand(weight), 3
    full = weight.shape[1] + first - 1
    mask = torch.from_numpy(product_cases.mask_of(tokens, weight.shape[1], Dropout(SEED, 0, first, full, threshold_of(p)))) if p else 1.0
    rounded = whole.bfloat16()

    def exact(wide: Tensor, x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return x @ wide.to(x.dtype).t() + bias + SCALE * ((x * mask) @ lora_a.t()) @ lora_b.t()

    given = inputs(tokens, weight, rank)
    ours = {"scale": SCALE, "dropout_p": p, "seed": SEED, "first_column": first, "full_width": full}
    for dtype, wide, limit in ((torch.float32, whole, 1e-6), (torch.bfloat16, rounded, 8e-3)):
        wanted = results(lambda wide=wide, **t: exact(wide, **t), given, torch.float64)
        sizes = results(lambda wide=wide, **t: exact(wide.abs(), **t), given, torch.float64, signed=False)
        found = results(lambda **t: quantised_linear(weight=weight, **t, **ours), given, dtype)
        for name, value in wanted.items():
            assert distance(found[name], value, sizes[name]) < limit, (name, dtype)


@needs_kernel
@pytest.mark.parametrize("kind", ["int8", "nf4-64"])
def test_the_kernel_equals_dequantising_first(kind: str) -> None:
    """One rounding of the weight, one of the output: nothing but the order of the sums may differ."""
    weight = quantised(kind, 330, 272)
    whole, given = by_hand(weight).bfloat16(), inputs(70, weight, 8)
    x = given["x"].bfloat16().requires_grad_()
    output = quantised_linear(x, weight)
    wanted = x.double() @ whole.double().t()
    assert ((output.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()
    pull = draw(70, 330, seed=9).bfloat16()
    (grad,) = torch.autograd.grad(output, x, pull)
    wanted = pull.double() @ whole.double()
    assert ((grad.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()
    errors = {}
    exact = results(lambda x, bias, lora_a, lora_b: x @ whole.double().t() + bias + SCALE * (x @ lora_a.t()) @ lora_b.t(), given, torch.float64)
    for kernels in ("quantised_linear", "reference"):
        choice.select(kernels)
        found = results(lambda **t: quantised_linear(weight=weight, **t, scale=SCALE), given, torch.bfloat16)
        errors[kernels] = {name: distance(found[name], wanted) for name, wanted in exact.items()}
    assert all(error < 1.05 * errors["reference"][name] + 1e-4 for name, error in errors["quantised_linear"].items())
    assert errors["quantised_linear"]["output"] < errors["reference"]["output"], "the kernel did not run"


def test_a_checkpoint_of_bitsandbytes() -> None:
    """Codes and magnitudes that bitsandbytes wrote, double quantisation too, give what its reader of checkpoints gives."""
    weight = draw(24, 64, seed=1)
    plain = quantise_nf4(weight)
    blocks, offset = plain.magnitudes, float(plain.magnitudes.mean())
    table = torch.linspace(-1, 1, 256)
    scales = (blocks - offset).view(-1, 8).abs().amax(1)
    levels = ((blocks - offset).view(-1, 8) / scales[:, None]).flatten()
    codes = (levels[:, None] - table).abs().argmin(1).to(torch.uint8)
    nested = QuantisedWeight(plain.codes, Nested(codes, table, scales, 8, offset), plain.shape, plain.block)
    assert (nested.magnitudes - blocks).abs().max() < float(scales.max()) / 128
    x = draw(5, 64, seed=2).bfloat16()
    assert torch.equal(quantised_linear(x, nested), quantised_linear(x, QuantisedWeight(plain.codes, nested.magnitudes, plain.shape, 64)))
    assert NF4 == product_cases.NF4
    assert plain.codes.shape == (24 * 64 // 2,)
    assert by_hand(plain).equal(plain.rows(0, 24, torch.float32))
    assert (by_hand(plain) - weight).abs().max() < 0.16 * weight.abs().max()
    assert (by_hand(quantise_int8(weight)) - weight).abs().max() < weight.abs().max() / 250
    again = quantise_nf4(by_hand(plain))
    assert torch.equal(again.codes, plain.codes), "values of the table are their own nearest"


def test_leading_dimensions_autocast_recomputation_and_nothing() -> None:
    weight = quantised("nf4-64", 48, 64)
    given = {name: tensor.bfloat16() for name, tensor in inputs(12, weight, 4).items()}
    output = quantised_linear(weight=weight, **given)
    cube = given["x"].view(3, 4, 64).transpose(0, 1)
    assert torch.equal(quantised_linear(weight=weight, **{**given, "x": cube}), output.view(3, 4, 48).transpose(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantised_linear(weight=weight, **{name: tensor.float() for name, tensor in given.items()}), output)
    given["x"].requires_grad_()
    plain = torch.autograd.grad(quantised_linear(weight=weight, **given, dropout_p=0.2).sum(), given["x"])
    again = torch.utils.checkpoint.checkpoint(
        lambda x: quantised_linear(weight=weight, **{**given, "x": x}, dropout_p=0.2), given["x"], use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(again.sum(), given["x"])[0], plain[0])
    empty = quantised_linear(given["x"][:0], weight)
    assert empty.shape == (0, 48)
    assert torch.autograd.grad(empty.sum(), given["x"])[0].count_nonzero() == 0


@needs_kernel
def test_what_torch_checks_threads_and_errors() -> None:
    weight = quantised("nf4-64", 200, 64)
    given = {name: tensor.bfloat16() for name, tensor in inputs(40, weight, 4).items()}
    low, operator = draw(40, 4, seed=7).bfloat16(), torch.ops.mswift.quantised_product
    arguments = (weight.codes, weight.magnitudes, 200, 64, 64)
    for rest in (
        (given["x"], *arguments, given["bias"], low, given["lora_b"], False, [0] * 5),
        (draw(40, 200, seed=8).bfloat16(), *arguments, None, low, given["lora_a"], True, [50, 9, 0, 0, 64]),
    ):
        assert set(torch.library.opcheck(operator.default, rest).values()) == {"SUCCESS"}
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            both = operator(*rest)
            torch.set_num_threads(1)
            assert torch.equal(operator(*rest), both)
        finally:
            torch.set_num_threads(threads)
    x = given["x"]
    codes, scales, *sizes = arguments
    rest = (None, None, None, False, [0] * 5)
    for wrong, message in (
        (lambda: operator(x[:, :48], *arguments, *rest), "x: wanted"),
        (lambda: operator(x, *arguments, None, low, None, False, [0] * 5), "up: wanted beside low"),
        (lambda: operator(x, *arguments, given["bias"][:5], *rest[1:]), "bias: wanted"),
        (lambda: operator(x, codes[:-1], scales, *sizes, *rest), "codes: wanted uint8"),
        (lambda: operator(x, codes, scales[1:], *sizes, *rest), "scales: wanted float32"),
        (lambda: operator(x.float(), *arguments, *rest), "x: wanted bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            wrong()


PROGRAM = """
import torch
from pathlib import Path
from mswift.kernels.quantised_linear import QuantisedWeight, quantised_linear

def kib(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

torch.set_num_threads(1)
rows = columns = 8192
codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8)
weight = QuantisedWeight(codes, torch.rand(rows * columns // 64), (rows, columns), 64)
small = QuantisedWeight(codes[: 64 * 32], weight.scales[:64], (64, 64), 64)
x = torch.randn(16, columns).bfloat16().requires_grad_()
quantised_linear(torch.randn(16, 64).bfloat16().requires_grad_(), small).sum().backward()
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
quantised_linear(x, weight).float().square().sum().backward()
print((kib("VmHWM") - before) / 1024)
"""


@needs_kernel
def test_the_weight_never_exists_as_a_whole() -> None:
    """8192 x 8192 are 128 MiB in bf16; forward and backward take a few strips."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 12


def test_double_quantisation() -> None:
    """Magnitudes in 8 bits: bitsandbytes' table, and the nearest entry of it for each magnitude."""
    magnitudes = draw(1000, seed=4).abs() + 0.5
    found = nested(magnitudes, 64)
    assert found.table[[0, 1, 127, 128, 254, 255]].tolist() == pytest.approx([-0.9929688, -0.9789063, 0.0, 5.5e-7, 0.9929688, 1.0], abs=1e-7)
    assert len(found.table.unique()) == 256
    assert (found.codes.shape, found.scales.shape) == ((1000,), (16,))
    spread = found.scales.repeat_interleave(64)[:1000]
    nearest = ((magnitudes - found.offset)[:, None] / spread[:, None] - found.table).abs().argmin(1)
    assert (found.codes.long() != nearest).sum() <= 2, "halfway between two"
    assert ((found.values() - magnitudes).abs() <= spread * (found.table.diff().max() / 2 + 1e-6)).all()
    assert found.values().shape == magnitudes.shape
    assert nested(torch.full((7,), 2.0)).values().tolist() == [2.0] * 7
    weight = QuantisedWeight(torch.zeros(32000, dtype=torch.uint8), found, (64, 1000), 64)
    assert weight.nbytes == 32000 + 1000 + 16 * 4


def test_quantised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary memory does not grow with the weight; a part of the columns takes the factors of whole rows."""
    weight = draw(130, 50, seed=5)
    whole = quantise_nf4(weight)
    monkeypatch.setattr(module, "_BLOCKS_AT_ONCE", 3)
    parts = quantise_nf4(weight)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.magnitudes, whole.magnitudes)
    half = quantise_int8(weight[:, :20], module.largest_of_rows(weight))
    assert torch.equal(half.codes, quantise_int8(weight).codes[:, :20])
    assert half.codes.shape == (130, 20)
