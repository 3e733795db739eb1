"""Weights that the quantisation libraries wrote, read as those libraries read them: to the last bit. `references/make.py` made the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mswift.conversion.quantised import open_checkpoint
from tests.unit.conversion.quantisers import write

FILES = sorted(Path(__file__).with_name("references").glob("*.safetensors"))


def cases() -> list[tuple[str, str]]:
    found = []
    for path in FILES:
        with safe_open(path, "pt") as file:
            found += [(path.stem, case) for case in json.loads(file.metadata()["cases"])]
    return found


def test_every_library_has_its_file() -> None:
    assert [path.stem for path in FILES] == ["auto_gptq", "autoawq", "bitsandbytes", "compressed_tensors"]
    assert len(cases()) == 19


@pytest.mark.parametrize(("library", "case"), cases())
def test_a_weight_is_what_its_library_makes_of_it(library: str, case: str, tmp_path: Path) -> None:
    with safe_open(Path(__file__).with_name("references") / f"{library}.safetensors", "pt") as file:
        note = json.loads(file.metadata()["cases"])[case]
        tensors = {name.removeprefix(f"{case}|"): file.get_tensor(name) for name in file.keys() if name.startswith(f"{case}|")}  # noqa: SIM118
    wanted = tensors.pop("")
    with open_checkpoint(write(tmp_path, tensors, note["settings"], note["dtype"])) as reader:
        assert reader.names == ["x.weight"]
        got = reader.read("x.weight")
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert torch.equal(reader.read("x.weight", slice(3, 21), slice(5, 40)), wanted[3:21, 5:40])
