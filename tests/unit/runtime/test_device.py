"""What a device offers: the memory of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mswift.launch import MALLOC

PROGRAM = """
import torch
from mswift.runtime.device import Runtime

runtime = Runtime(torch.device("cpu"), "gloo")
before = runtime.memory_bytes()
parts = [torch.ones(2**18) for _ in range(200)]
held = runtime.memory_bytes()
parts = parts[::20]
freed = runtime.memory_bytes()
runtime.release_freed()
print(*(value // 2**20 - before // 2**20 for value in (held, freed, runtime.memory_bytes())), int(sum(part.sum() for part in parts)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    """With the allocator settings of the launcher, which keep it for speed."""
    environment = {**MALLOC, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    held, freed, released, total = map(int, done.stdout.split())
    assert held > 190
    assert freed > 0.9 * held
    assert released < 0.3 * held
    assert total == 10 * 2**18, "what is in use stays"
