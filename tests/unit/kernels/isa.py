"""Tests once more, in a process that is told that the processor has less than it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys


def passed_with(isa: str, file: str, which: str, *, torch_too: bool = False) -> int:
    """How many of the tests of `file` that ``-k which`` chooses pass with `isa`; none may fail.

    Args:
        torch_too: also torch is told that the processor has no more than AVX2.
    """
    code = f"from mswift.kernels import extension; import sys, pytest; assert extension.isa() == {isa!r}; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = [file, "-x", "-p", "no:cacheprovider", "-k", which]
    told = {"MSWIFT_ISA": isa, **({"ATEN_CPU_CAPABILITY": "avx2"} if torch_too else {})}
    done = subprocess.run([sys.executable, "-c", code, *chosen], env={**os.environ, **told}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:]
    return int(found[1])
