"""The vocabulary's head against float64, for the emulated library: statistics, gradients, the one sweep of a frozen head, on shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mswift.kernels import cuda_abi as abi
from tests.unit.csrc.emulator import RESIDENT, Emulator, Structure, close, given, head, rounded, unwritten, wide


class Problem(NamedTuple):
    """A head over `size` real rows of a padded vocabulary, split over `ranks`."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    labels: np.ndarray
    size: int
    ranks: int
    scale: float
    softcap: float

    def shards(self) -> list[tuple[int, Structure, np.ndarray]]:
        rows = len(self.weight) // self.ranks
        found = []
        for rank in range(self.ranks):
            part = slice(rank * rows, (rank + 1) * rows)
            weight = np.ascontiguousarray(self.weight[part])
            bias = None if self.bias is None else np.ascontiguousarray(self.bias[part])
            fields = given(x=self.x, weight=weight, bias=bias, labels=self.labels, tokens=len(self.x), hidden=self.x.shape[1])
            found.append((rank * rows, head(**fields, vocab=rows, first=rank * rows, size=self.size, scale=self.scale, softcap=self.softcap), weight))
        return found

    def logits(self) -> np.ndarray:
        z = self.scale * (wide(self.x) @ wide(self.weight).T + (0 if self.bias is None else wide(self.bias)))
        z = self.softcap * np.tanh(z / self.softcap) if self.softcap else z
        return z[:, : self.size]

    def slope(self) -> np.ndarray:
        z = self.logits()
        return 1 - (z / self.softcap) ** 2 if self.softcap else np.ones_like(z)


def problem(random: np.random.Generator, tokens: int, hidden: int, vocab: int, *, padding: int = 0, ranks: int = 1, **more: Any) -> Problem:
    spread = more.get("spread", 1.0)
    weight = rounded(random.normal(size=(vocab, hidden)) * spread / np.sqrt(hidden))
    bias = random.normal(size=vocab).astype(np.float32) if more.get("bias") else None
    labels = random.integers(0, vocab - padding, size=tokens)
    labels[0], labels[-1] = 0, vocab - padding - 1
    return Problem(
        rounded(random.normal(size=(tokens, hidden))), weight, bias, labels, vocab - padding, ranks, more.get("scale", 1.0), more.get("softcap", 0.0)
    )


def problems(random: np.random.Generator) -> list[Problem]:
    return [
        problem(random, 5, 24, 300, padding=7),
        problem(random, 133, 40, 272, padding=5, ranks=2, softcap=3.0, scale=0.8, bias=True),
        problem(random, 3, 37, 145, scale=1.3),
        problem(random, 2, 16, 280, padding=150, ranks=2, spread=2e4),  # logits of 1e4; the second shard is padding only
    ]


def wide_problems(random: np.random.Generator) -> list[Problem]:
    """One for each further width of the kernels that keep gradients on chip."""
    return [problem(random, 3, 300, 70, padding=3, scale=1.3), problem(random, 67, 599, 40, bias=True, softcap=5.0)]


def expected(case: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Log-sum-exp, label's logit, entropy, sum of logits, probabilities."""
    z = case.logits()
    top = z.max(1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(z - top).sum(1))
    p = np.exp(z - lse[:, None])
    entropy = -(p * (z - lse[:, None])).sum(1)
    return lse, z[np.arange(len(z)), case.labels], entropy, z.sum(1), p


def gathered_statistics(emulator: Emulator, case: Problem, splits: int) -> np.ndarray:
    tokens = len(case.x)
    parts = unwritten(case.ranks, 5, tokens)
    for (_, structure, _), part in zip(case.shards(), parts):
        scratch, stats = unwritten(splits, 5, tokens), unwritten(5, tokens)
        emulator.call("mswift_head_statistics", structure, stats, scratch, splits, out=(stats, scratch))
        part[:] = stats
    merged = unwritten(5, tokens)
    emulator.call("mswift_head_merge", parts, merged, case.ranks, tokens, out=(merged,))
    return merged


def check_statistics(case: Problem, merged: np.ndarray) -> None:
    lse, label, entropy, total, _ = expected(case)
    top, sums, got_label, spread, got_total = merged.astype(np.float64)
    close((top + np.log(sums)).astype(np.float32), lse, 3e-6)
    close(got_label.astype(np.float32), label, 3e-6)
    # sums of many terms: an absolute measure that grows with the logits
    assert np.abs(np.log(sums) - spread / sums - entropy).max() <= 3e-5 * max(1.0, np.abs(case.logits()).max() / 50)
    assert np.abs(got_total - total).max() <= 3e-6 * np.abs(case.logits()).sum(1).max()


def statistics(emulator: Emulator, random: np.random.Generator) -> None:
    for case, splits in zip(problems(random), (1, 2, 2, 1)):
        check_statistics(case, gathered_statistics(emulator, case, splits))


def within(got: np.ndarray, want: np.ndarray, magnitude: np.ndarray) -> None:
    """No farther apart than the rounding of the logits' gradient to bf16 explains, and half of that on average."""
    error = np.abs(got - want)
    assert np.isfinite(got).all()
    assert (error <= magnitude * 2.0**-8 + 1e-5 * magnitude.max()).all(), (error / magnitude).max()
    assert error.mean() <= magnitude.mean() * 2.0**-9 + 1e-5 * magnitude.max()


def workspace(emulator: Emulator, hidden: int, groups: int) -> np.ndarray:
    return unwritten(groups * emulator.functions["mswift_head_group"](hidden) * abi.HEAD_WORKSPACE, dtype=np.uint8)


def by_groups(
    emulator: Emulator, structure: Structure, lse: np.ndarray, coefficients: np.ndarray, rows: int, hidden: int, groups: int = 2
) -> tuple[np.ndarray, ...]:
    """Whole by one group and in parts by several; the weight's gradient in fp32, added to what is there, and in bf16."""
    tokens, before = len(lse), np.linspace(-1, 1, rows * hidden).reshape(rows, hidden).astype(np.float32)
    dx, again, parts = unwritten(tokens, hidden), unwritten(tokens, hidden), unwritten(2, tokens, hidden)
    dweight, rounded_dweight, dbias = before.copy(), unwritten(rows, hidden, dtype=np.uint16), unwritten(rows)
    work = workspace(emulator, hidden, groups)
    out: tuple[np.ndarray, ...] = (dx, dweight, dbias, work)
    emulator.call("mswift_head_gradient", structure, lse, coefficients, dx, None, 1, dweight, 0, 1, dbias, work, 1, out=out)
    arguments = (structure, lse, coefficients, again, parts, 2, rounded_dweight, 1, 0, None, work, groups)
    emulator.call("mswift_head_gradient", *arguments, out=(again, parts, rounded_dweight, work))
    close(again, wide(dx), 1e-5)
    close(rounded_dweight, wide(dweight) - wide(before), 1e-5)
    return dx, dweight - before, dbias


def on_chip(emulator: Emulator, structure: Structure, lse: np.ndarray, coefficients: np.ndarray, rows: int, hidden: int) -> tuple[np.ndarray, ...]:
    """Whole and in parts; the weight's gradient in fp32, added to what is there, and in bf16."""
    tokens, before = len(lse), np.linspace(-1, 1, rows * hidden).reshape(rows, hidden).astype(np.float32)
    dx, again, parts = unwritten(tokens, hidden), unwritten(tokens, hidden), unwritten(3, tokens, hidden)
    dweight, rounded_dweight, dbias = before.copy(), unwritten(rows, hidden, dtype=np.uint16), unwritten(rows)
    emulator.call("mswift_head_gradient_on_chip", structure, lse, coefficients, dx, None, 1, dweight, 0, 1, dbias, out=(dx, dweight, dbias))
    arguments = (structure, lse, coefficients, again, parts, 3, rounded_dweight, 1, 0, None)
    emulator.call("mswift_head_gradient_on_chip", *arguments, out=(again, parts, rounded_dweight))
    close(again, wide(dx), 1e-5)
    close(rounded_dweight, wide(dweight) - wide(before), 1e-5)
    return dx, dweight - before, dbias


def group_problems(random: np.random.Generator) -> list[Problem]:
    """Groups of two blocks and of three, several steps, the last of them not for all blocks; more tiles of rows than groups."""
    return [problem(random, 131, 200, 560, padding=3, scale=1.3, bias=True, softcap=5.0), problem(random, 37, 261, 450, padding=70)]


def gradient(emulator: Emulator, random: np.random.Generator) -> None:
    check_gradient(emulator, random, [*problems(random)[:3], *group_problems(random)], by_groups)


def several_passes(emulator: Emulator, random: np.random.Generator) -> None:
    """More columns than blocks fit on the device: the same again for the rest of them."""
    case = problem(random, 3, 261, 300, padding=4, bias=True)
    emulator.hold(4)
    assert [emulator.functions["mswift_head_group"](hidden) for hidden in (1, 512, 513, 1536, 1537)] == [1, 4, 3, 4, 4]
    assert [emulator.functions["mswift_head_groups"](hidden) for hidden in (1, 256, 384, 10**6)] == [4, 2, 1, 1]
    emulator.hold(2)
    try:
        check_gradient(emulator, random, [case], partial(by_groups, groups=1))
        check_sweep(emulator, random, case, partial(sweep_by_groups, splits=2))
    finally:
        emulator.hold(RESIDENT)


def gradient_on_chip(emulator: Emulator, random: np.random.Generator) -> None:
    check_gradient(emulator, random, [*problems(random)[:3], *wide_problems(random)], on_chip)


def check_gradient(emulator: Emulator, random: np.random.Generator, cases: list[Problem], run: Callable[..., tuple[np.ndarray, ...]]) -> None:
    """Both factors, every coefficient, against the formula with the probabilities of float64."""
    for case in cases:
        tokens, hidden = case.x.shape
        lse, _, _, _, p = expected(case)
        lse32 = lse.astype(np.float32)
        coefficients = random.normal(size=(4, tokens)).astype(np.float32)
        of_label, of_prob, of_entropy, of_uniform = wide(coefficients)[..., None]
        dz = p * (of_prob + of_entropy * (case.logits() - lse[:, None])) + of_uniform
        dz[np.arange(tokens), case.labels] += of_label[:, 0]
        dz = np.pad(dz * case.slope() * case.scale, ((0, 0), (0, len(case.weight) - case.size)))
        whole = np.zeros((tokens, hidden))
        for first, structure, weight in case.shards():
            rows = len(weight)
            dx, dweight, dbias = run(emulator, structure, lse32, coefficients, rows, hidden)
            part = dz[:, first : first + rows]
            within(dweight, part.T @ wide(case.x), np.abs(part).T @ np.abs(wide(case.x)))
            within(dbias, part.sum(0), np.abs(part).sum(0))
            whole += dx
        within(whole, dz @ wide(case.weight), np.abs(dz) @ np.abs(wide(case.weight)))


def rising(random: np.random.Generator, tokens: int = 134, hidden: int = 32, vocab: int = 200) -> Problem:
    """Logits that pass those of the first rows of the vocabulary by hundreds, for some tokens."""
    case = problem(random, tokens, hidden, vocab)
    weight = wide(case.weight)
    weight[: vocab * 2 // 3] *= 0.1
    x = wide(case.x)
    x[3] *= 300
    x[131] *= 100
    return case._replace(x=rounded(x), weight=rounded(weight))


def sweep_by_groups(emulator: Emulator, structure: Structure, tokens: int, hidden: int, splits: int) -> tuple[np.ndarray, ...]:
    """By one group where each has all of the vocabulary, else by two that share it."""
    group, groups = emulator.functions["mswift_head_group"](hidden), min(splits, emulator.functions["mswift_head_groups"](hidden))
    stats, acc, partial_stats = unwritten(5, tokens), unwritten(tokens, hidden), unwritten(splits * group, 5, tokens)
    parts, work = unwritten(splits if splits > 1 else 0, tokens, hidden), workspace(emulator, hidden, groups)
    outputs = (stats, acc, partial_stats, parts, work)
    emulator.call("mswift_head_sweep", structure, stats, acc, partial_stats, parts, splits, work, groups, out=outputs)
    return stats, acc


def sweep_whole(emulator: Emulator, structure: Structure, tokens: int, hidden: int) -> tuple[np.ndarray, ...]:
    assert emulator.functions["mswift_head_on_chip"](hidden) == 1
    stats, acc = unwritten(5, tokens), unwritten(tokens, hidden)
    emulator.call("mswift_head_sweep_on_chip", structure, stats, acc, None, None, 1, out=(stats, acc))
    return stats, acc


def sweep_in_parts(emulator: Emulator, structure: Structure, tokens: int, hidden: int) -> tuple[np.ndarray, ...]:
    stats, acc, several, parts = unwritten(5, tokens), unwritten(tokens, hidden), unwritten(3, 5, tokens), unwritten(3, tokens, hidden)
    emulator.call("mswift_head_sweep_on_chip", structure, stats, acc, several, parts, 3, out=(stats, acc, several, parts))
    return stats, acc


def sweep(emulator: Emulator, random: np.random.Generator) -> None:
    for case in (*problems(random), rising(random), *group_problems(random), rising(random, 132, 130, 600)):
        for splits in (1, 2):
            check_sweep(emulator, random, case, partial(sweep_by_groups, splits=splits))


def sweep_on_chip(emulator: Emulator, random: np.random.Generator) -> None:
    for case in (*problems(random), *wide_problems(random), rising(random)):
        for run in (sweep_whole, sweep_in_parts):
            check_sweep(emulator, random, case, run)


def check_sweep(emulator: Emulator, random: np.random.Generator, case: Problem, run: Callable[..., tuple[np.ndarray, ...]]) -> None:
    """A frozen head: statistics and the input's gradient in one pass over the vocabulary, equal to those of the exact formula."""
    tokens, hidden = case.x.shape
    p = expected(case)[-1]
    of_label, of_prob = random.normal(size=(2, tokens)).astype(np.float32)
    whole, parts = np.zeros((tokens, hidden)), unwritten(case.ranks, 5, tokens)
    swept = []
    for (first, structure, weight), part in zip(case.shards(), parts):
        stats, acc = run(emulator, structure, tokens, hidden)
        part[:] = stats
        swept.append((first, weight, stats[0], acc))
    merged = unwritten(5, tokens)
    emulator.call("mswift_head_merge", parts, merged, case.ranks, tokens, out=(merged,))
    check_statistics(case, merged)
    lse = merged[0] + np.log(merged[1].astype(np.float64))
    of_row = case.scale * of_label * (1 - (merged[2] / case.softcap) ** 2 if case.softcap else 1.0)
    for first, weight, top, acc in swept:
        whole += (case.scale * of_prob * np.exp(top - lse))[:, None] * acc
        label = case.labels - first
        here = (label >= 0) & (label < len(weight))
        whole[here] += of_row[here, None] * wide(weight)[label[here]]
    dz = p * wide(of_prob)[:, None]
    dz[np.arange(tokens), case.labels] += of_label
    want = (dz * case.slope() * case.scale) @ wide(case.weight[: case.size])
    allowed = 2.0**-7 * np.abs(want).max(1, keepdims=True) + 1e-6  # of probabilities in bf16
    assert (np.abs(whole - want) <= allowed).all(), np.abs(whole - want).max()
    assert np.abs(whole - want).mean() <= 2e-3 * np.abs(want).max()


def without_label(emulator: Emulator, random: np.random.Generator) -> None:
    check_without_label(emulator, random, partial(sweep_by_groups, splits=2), chip=False)


def without_label_on_chip(emulator: Emulator, random: np.random.Generator) -> None:
    check_without_label(emulator, random, sweep_in_parts, chip=True)


def check_without_label(emulator: Emulator, random: np.random.Generator, run: Callable[..., tuple[np.ndarray, ...]], *, chip: bool) -> None:
    """Sums over all rows but the label's, which dominates by a thousand; the same rows averaged for both kinds of gradient."""
    tokens, hidden, vocab, cap = 4, 24 if chip else 140, 150, 0.0
    case = problem(random, tokens, hidden, vocab, softcap=cap)
    x, weight = wide(case.x) * (np.arange(hidden) % tokens == np.arange(tokens)[:, None]), wide(case.weight)
    weight[case.labels] = x * 40  # and 0 for the other tokens
    case = case._replace(x=rounded(x), weight=rounded(weight))
    structure = head(
        x=case.x, weight=case.weight, labels=case.labels, tokens=tokens, hidden=hidden, vocab=vocab, size=vocab, softcap=cap, without_label=1
    )
    z = case.logits()
    others = np.ones_like(z, dtype=bool)
    others[np.arange(tokens), case.labels] = False
    top = np.where(others, z, -np.inf).max(1)
    e = np.where(others, np.exp(np.where(others, z, 0) - top[:, None]), 0)
    stats, acc = run(emulator, structure, tokens, hidden)
    close(stats[0], top, 1e-6)
    logit_error = 3e-7 * np.abs(z).max()  # which is the relative error of its exponential
    close(stats[1], e.sum(1), logit_error)
    close(stats[2], z[np.arange(tokens), case.labels], 1e-6)
    close(stats[3], (e * (z - top[:, None]) * others).sum(1), logit_error)
    within(acc, e @ wide(case.weight), e @ np.abs(wide(case.weight)))
    coefficients, dx = np.zeros((4, tokens), dtype=np.float32), unwritten(tokens, hidden)
    coefficients[2] = 1
    reference = stats[0].copy()
    if chip:  # by the kernel that gave the reference: another one adds the logits up in another order
        emulator.call("mswift_head_gradient_on_chip", structure, reference, coefficients, dx, None, 1, None, 0, 0, None, out=(dx,))
    else:
        work = workspace(emulator, hidden, 1)
        emulator.call("mswift_head_gradient", structure, reference, coefficients, dx, None, 1, None, 0, 0, None, work, 1, out=(dx, work))
    weighted = e * np.where(others, z - top[:, None], 0)
    within(dx, weighted @ wide(case.weight), np.abs(weighted) @ np.abs(wide(case.weight)))


_ALL = (statistics, gradient, several_passes, gradient_on_chip, sweep, sweep_on_chip, without_label, without_label_on_chip)
CASES = {case.__name__: case for case in _ALL}
