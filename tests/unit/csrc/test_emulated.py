"""The CUDA kernels themselves, run thread by thread on the execution model of csrc/emu, against float64 and with faults planted in them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mswift.kernels import cuda_abi as abi
from tests.unit.csrc import elementwise_cases, head_cases, hopper_cases, product_cases
from tests.unit.csrc.emulator import ROOT, Emulator, FindingError, build, close, linear, unwritten, wide

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the execution model cannot be compiled")

CASES = {**elementwise_cases.CASES, **product_cases.CASES, **head_cases.CASES, **hopper_cases.CASES}
FAULTS = {
    1: ("no barrier between a block sum's writes and reads", "rms_norm", "nobody has written"),
    2: ("scratch of a block sum used again without a barrier", "many_rows", "race"),
    3: ("threads without elements leave before the block sum", "rms_norm", "left|have left"),
    4: ("no barrier between the warps' parts of a column's sum", "column_sum", "nobody has written"),
    5: ("the last elements are never written", "gated", "not written"),
    6: ("16-byte accesses without regard for alignment", "gated", "multiple of 16"),
    7: ("the backward rotation turns forward", "rope", "off by"),
    8: ("rows without a source stay unwritten", "permute", "not written"),
    9: ("dropout ignores which columns are here", "lora", "off by"),
    10: ("one row too many is read", "grouped", "off by|outside every buffer|across the end"),
    11: ("nf4's two codes of a byte swapped", "quantised", "off by"),
    12: ("cp.async awaited one group too late", "plain_linear", "cp.async"),
    13: ("no barrier after cp.async", "plain_linear", "race|nobody has written"),
    14: ("rows of an expert by the one before", "grouped", "off by"),
    15: ("the last part of the rows dropped", "lora", "off by"),
    16: ("sums of two parts added without regard for their maxima", "statistics", "off by|assert"),
    17: ("one row of padding counted as vocabulary", "statistics", "off by|assert"),
    18: ("a shard forgets where in the vocabulary it lies", "statistics", "off by|assert"),
    19: ("statistics of a tile read before all warps wrote theirs", "statistics", "race|nobody has written"),
    20: ("tiles of neighbouring blocks overlap", "plain_linear", "another thread wrote"),
    21: ("a block multiplies with its neighbour's slice of the hidden size", "gradient", "off by|assert"),
    22: ("a bias's gradient without the other blocks' tokens", "gradient", "assert"),
    23: ("some lanes leave before a shuffle", "permute", "left|have left"),
    27: ("sums on chip not brought to the new reference", "sweep_on_chip", "assert"),
    28: ("partial logits read before all warps wrote theirs", "sweep_on_chip", "race|nobody has written"),
    29: ("probabilities on chip read before they are there", "gradient_on_chip", "race|nobody has written"),
    30: ("parts on chip joined without regard for their maxima", "sweep_on_chip", "assert"),
    31: ("tiles of the other blocks not awaited", "gradient", "unordered: read"),
    32: ("one buffer where two are needed: written while others still read it", "gradient", "unordered: write"),
    33: ("maxima of the other blocks not awaited", "sweep", "unordered: read"),
    34: ("each block takes its own maximum for the reference", "sweep", "assert"),
    35: ("sums of a group not brought to the new reference", "sweep", "assert"),
    36: ("other blocks are told before all threads have written", "sweep", "unordered: read"),
    37: ("a block without rows of its own leaves its group", "gradient", "deadlock: block 0 waits for"),
    38: ("what other blocks wrote read past the caches that see it", "sweep", "past the caches"),
    25: ("rows of a group's mask counted from the first of all", "grouped", "off by"),
    40: ("weights of a group by the place of the one before", "grouped", "off by"),
    26: ("the same in the gradient of a weight", "grouped", "off by"),
    52: ("operands read without waiting for their loads", "hopper", "no load has filled|has not filled yet|has not waited for its barrier"),
    41: ("a stage given back before the products that read it are over", "hopper", "may still be reading"),
    42: ("a ring that waits for stages nobody has filled to be emptied", "hopper", "deadlock"),
    43: ("operands described without their swizzle", "hopper", "off by|no load has filled"),
    44: ("a weight by rows described as one by columns", "hopper", "off by|no load has filled"),
    45: ("more bytes expected than come", "hopper", "deadlock"),
    46: ("no fence between other uses of accumulators and wgmma", "hopper", "without wgmma.fence"),
    47: ("barriers not fenced after their initialisation", "hopper", "not fenced"),
    48: ("a wrong stride between the parts of a weight by columns", "hopper", "off by"),
    49: ("sums used before the products are over", "hopper", "finite|written before it was waited for|never waited for"),
    50: ("fewer bytes expected than come", "hopper", "has not filled yet|more than it expected"),
    51: ("operands read a turn of the ring too early", "hopper", "no load has filled|has not filled yet|has not waited for its barrier"),
    24: ("tiles stored without the swizzle that they are read with", "plain_linear", "off by"),
}


@pytest.fixture(scope="module")
def library() -> Path:
    return build()


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_float64(library: Path, name: str) -> None:
    CASES[name](Emulator(library), np.random.default_rng(0))


@pytest.mark.parametrize("seed", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_the_order_of_threads_and_blocks_does_not_matter(library: Path, seed: int) -> None:
    """Bit for bit: the sums of every kernel have a fixed order."""
    random = np.random.default_rng(seed)
    for case in CASES.values():
        case(Emulator(library, seed=seed), random)
    x, results = random.normal(size=(300, 40)).astype(np.float32), []
    for order in (0, seed):
        partial, out = unwritten(abi.NORM_BLOCKS, 40), unwritten(40)
        Emulator(library, seed=order).call("mswift_column_sum", 0, x, None, partial, out, 300, 40, 40, out=(partial, out))
        results.append(out)
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(library: Path, fault: int) -> None:
    what, name, finding = FAULTS[fault]
    with pytest.raises(AssertionError) as caught:
        CASES[name](Emulator(library, fault=fault), np.random.default_rng(0))
    assert re.search(finding, f"{type(caught.value).__name__} {caught.value} {caught.traceback[-1].statement}"), f"{what}: {caught.value}"


def test_every_planted_fault_is_in_the_table() -> None:
    sources = [path.read_text(encoding="utf8") for path in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    planted = {int(number) for source in sources for number in re.findall(r"FAULT\((\d+)\)", source)}
    assert planted == set(FAULTS)
    assert len(planted) >= 10


def test_the_model_finds_a_write_to_an_input_and_a_read_beyond(library: Path) -> None:
    emulator = Emulator(library)
    x, index = np.ones((2, 8), dtype=np.float32), np.array([0, 5])
    with pytest.raises(FindingError, match="an input"):
        emulator.call("mswift_gather_rows", 0, x, np.array([0, 1]), unwritten(2, 8), 2, 8)
    out = unwritten(2, 8)
    with pytest.raises(FindingError, match=r"read .* outside every buffer"):
        emulator.call("mswift_gather_rows", 0, x, index, out, 2, 8, out=(out,))
    emulator.call("mswift_gather_rows", 0, x, np.array([0, 1]), out, 2, 8, out=(out,))
    assert (out == 1).all()


def test_the_model_refuses_tensor_maps_that_the_driver_refuses(library: Path) -> None:
    encode = Emulator(library).library["emu_tensor_map"]
    encode.argtypes = [ctypes.c_uint64] * 4 + [ctypes.c_uint32] * 2
    address, good = 1 << 20, (100, 7, 208, 64, 128)  # columns, rows, bytes from row to row, a box of columns and rows
    assert encode(address, *good) == 0
    assert encode(address + 8, *good) != 0, "the address is a multiple of 16"
    for place, wrong in ((0, 0), (0, 105), (1, 0), (1, 2**32 + 1), (2, 216), (2, 2**40), (3, 72), (3, 60), (3, 0), (4, 257), (4, 0)):
        values = [*good]
        values[place] = wrong
        assert encode(address, *values) != 0, values


# Examples of the PTX ISA, section "Canonical Layouts", for bf16: (mode of the swizzle and its bits; transposed; the layout without swizzle as
# extents and strides of mn, then of k, in elements; leading and stride offsets in bytes), and those that the kernel uses.
LAYOUTS = [
    (0, 0, True, ((8, 1, 2), (1, 8, 64)), ((8, 2), (8, 128)), 128 * 2, 64 * 2),
    (3, 1, True, ((8, 2, 2), (1, 8, 128)), ((8, 2), (16, 256)), 128 * 2, 256 * 2),
    (2, 2, True, ((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512)), 256 * 2, 512 * 2),
    (1, 3, True, ((8, 8, 4), (1, 8, 4096)), ((8, 2), (64, 512)), 8192, 1024),
    (1, 3, False, ((8, 8), (64, 512)), ((8, 2), (1, 8)), 0, 1024),
]


@pytest.mark.parametrize(("mode", "bits", "transposed", "mn", "k", "leading", "stride"), LAYOUTS)
def test_the_model_reads_descriptors_as_the_manual_says(
    library: Path, mode: int, bits: int, transposed: bool, mn: tuple[tuple[int, ...], ...], k: tuple[tuple[int, ...], ...], leading: int, stride: int
) -> None:
    operand = Emulator(library).library["emu_operand"]
    operand.argtypes, operand.restype = (ctypes.c_uint64, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32), ctypes.c_uint32
    start = 5 * 4096
    descriptor = mode << 62 | stride >> 4 << 32 | leading >> 4 << 16 | start >> 4

    def at(index: int, extents: tuple[int, ...], strides: tuple[int, ...]) -> int:
        return sum(index // int(np.prod(extents[:i])) % extents[i] * strides[i] for i in range(len(extents)))

    seen = set()
    for i in range(int(np.prod(mn[0]))):
        for j in range(16):
            plain = start + 2 * (at(i, *mn) + at(j, *k))
            rows = plain // 128 % 2**bits
            want = plain ^ rows << 4
            assert operand(descriptor, transposed, i, j) == want, (i, j)
            seen.add(want)
    assert len(seen) == 16 * int(np.prod(mn[0])), "no two elements share a place"


def test_the_kernel_for_hopper_leaves_to_the_other_what_it_does_not_do(library: Path) -> None:
    """Rows that are no multiple of 16 bytes, small sizes, groups, other weights, or not asked for: right all the same, and without one wgmma."""
    emulator, random = Emulator(library), np.random.default_rng(0)
    with hopper_cases.wgmma(emulator, 0):
        for case in ("plain_linear", "grouped", "quantised"):
            CASES[case](emulator, random)
    for k, asked, count in ((76, "1", 0), (72, "0", 0), (72, "", 0), (72, "1", 8 * 2)):
        x, weight, out = (product_cases.some(random, *shape) for shape in ((70, k), (72, k), (70, 72)))
        with hopper_cases.wgmma(emulator, count, asked):
            emulator.call("mswift_linear", linear(x=x, weight=weight, out=out, rows=70, n=72, k=k, x_stride=k), out=(out,))
            close(out, wide(x) @ wide(weight).T, 1e-6)


def test_blocks_that_wait_for_each_other_have_to_fit_on_the_device(library: Path) -> None:
    emulator, tokens, hidden = Emulator(library), 4, 130
    case = head_cases.problem(np.random.default_rng(0), tokens, hidden, 40)
    ((_, structure, _),) = case.shards()
    stats, acc, partial, work = unwritten(5, tokens), unwritten(tokens, hidden), unwritten(16, 5, tokens), head_cases.workspace(emulator, hidden, 8)
    parts = unwritten(8, tokens, hidden)
    assert emulator.functions["mswift_head_groups"](hidden) == 6
    arguments = ("mswift_head_sweep", structure, stats, acc, partial, parts, 8, work)
    with pytest.raises(RuntimeError, match="returned 720"):
        emulator.call(*arguments, 7, out=(stats, acc, partial, parts, work))
    assert emulator.counters()["launches"] == 0
    with pytest.raises(RuntimeError, match=f"returned {abi.UNSUPPORTED}"):
        emulator.call(*arguments, 0, out=(stats, acc, partial, parts, work))
    emulator.call(*arguments, 6, out=(stats, acc, partial, parts, work))
    assert np.isfinite(acc).all()


def test_sizes_that_a_kernel_does_not_do_are_refused(library: Path) -> None:
    emulator = Emulator(library)
    x = np.zeros((2, 6), dtype=np.float32)
    with pytest.raises(RuntimeError, match=f"returned {abi.UNSUPPORTED}"):
        emulator.call("mswift_rope", 0, x, x, x, x, 2, 1, 6, 5, 1, 6, 6, 6, 6, 0, 1, out=(x,))
    with pytest.raises(RuntimeError, match=f"returned {abi.UNSUPPORTED}"):
        emulator.call("mswift_rope", 0, x, x, x, x, 2, 1, 6, 8, 1, 6, 6, 6, 6, 0, 1, out=(x,))
    assert emulator.counters()["launches"] == 0


SANITIZED = """
import sys, numpy as np
from pathlib import Path
from tests.unit.csrc import elementwise_cases, head_cases, hopper_cases, product_cases
from tests.unit.csrc.emulator import Emulator
cases = {**elementwise_cases.CASES, **product_cases.CASES, **head_cases.CASES, **hopper_cases.CASES}
emulator = Emulator(Path(sys.argv[1]), fault=int(sys.argv[2]), registered=False)
for name in sys.argv[3:] or cases:
    cases[name](emulator, np.random.default_rng(0))
    print("done", name)
"""


def sanitized(fault: int, *names: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT), "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", SANITIZED, str(build(sanitize=True)), str(fault), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def test_kernels_under_address_sanitizer() -> None:
    done = sanitized(0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == len(CASES)
    wrong = sanitized(10, "weight_gradient")
    assert wrong.returncode != 0
    assert "heap-buffer-overflow" in wrong.stderr
