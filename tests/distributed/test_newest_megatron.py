"""The newest megatron-core wheel that the CPU runtime claims: layouts and resume again, with it in front of the installed one.

It is built for a later Python and is unpacked rather than installed: its Python sources run here as well. It imports triton, which is
fetched beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mswift.runtime.cpu import TESTED_MEGATRON_VERSIONS

ROOT = Path(__file__).parents[2]


def download(package: str, folder: Path, *options: str) -> None:
    """Fetch a wheel with pip into `folder`, or skip with pip's reason where there is no package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), *options, package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{package} cannot be downloaded here: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
def test_layouts_and_resume_on_the_newest_wheel(tmp_path: Path) -> None:
    newest = TESTED_MEGATRON_VERSIONS[-1]
    download(f"megatron-core=={newest}", tmp_path, "--ignore-requires-python", "--python-version", "3.12")
    download("triton", tmp_path)
    for wheel in tmp_path.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import megatron.core as m; print(m.__version__, m.__file__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert where.stdout.startswith(f"{newest} {tmp_path}")
    tests = ["tests/distributed/test_layouts.py", "tests/distributed/test_resume.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
