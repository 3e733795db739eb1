"""Pickles of weights: what torch saves is read to the last bit, by slice; what is no tensor is refused, and no code of a file runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mswift.conversion import pickles
from mswift.conversion.pickles import HeldFile, PickleReader, open_pickle
from mswift.conversion.quantised import open_checkpoint
from mswift.conversion.safetensors_io import CheckpointReader, SafetensorsFile
from mswift.errors import ModelError
from tests.unit.conversion.quantisers import CASES, write
from tests.unit.conversion.synthetic import Model, equal_bits
from tests.unit.conversion.test_safetensors_io import bits, of_every_dtype

TENSORS = Model().tensors()
KINDS = ["number", "nested", "text", "sparse", "meta"]
NEWER = {torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2}
"""Types that torch itself does not read back from a file of the form before 1.6."""
FORMS = pytest.mark.parametrize("archive", [True, False], ids=["archive", "before-1.6"])


def pickled(directory: Path, content: Any, archive: bool = True) -> Path:
    """A model directory of one pickle; returns the path of that."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    torch.save(content, directory / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    return directory / "pytorch_model.bin"


def pickled_parts(directory: Path, archive: bool = True) -> Path:
    """A model directory of two pickles and an index; returns the path of the index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    weight_map = {}
    for part, names in enumerate((list(TENSORS)[::2], list(TENSORS)[1::2])):
        filename = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: TENSORS[name] for name in names}, directory / filename, _use_new_zipfile_serialization=archive)
        weight_map |= dict.fromkeys(names, filename)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory / "pytorch_model.bin.index.json"


def error_of(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@FORMS
def test_every_type_is_read_to_the_last_bit(archive: bool, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in of_every_dtype().items() if archive or tensor.dtype not in NEWER}
    path = pickled(tmp_path, {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}, archive)
    with PickleReader(tmp_path) as reader:
        assert reader.names == list(tensors)
        assert reader.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            found = reader.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bits(found) == bits(tensor), name
    assert isinstance(open_pickle(path, {}), SafetensorsFile if archive else HeldFile)


@FORMS
@pytest.mark.parametrize("rows", [None, slice(2, 5), slice(0, 0)])
@pytest.mark.parametrize("columns", [None, slice(1, 4)])
def test_slices(rows: slice | None, columns: slice | None, archive: bool, tmp_path: Path) -> None:
    wide, deep = torch.randn(7, 6), torch.randn(7, 6, 3)
    pickled(tmp_path, {"pad": torch.ones(5), "wide": wide, "deep": deep, "part": deep[3:], "turned": wide.t()}, archive)
    with PickleReader(tmp_path) as reader:
        for name, tensor in {"wide": wide, "deep": deep, "part": deep[3:], "turned": wide.t()}.items():
            expected = tensor[rows or slice(None)][:, columns or slice(None)]
            assert torch.equal(reader.read(name, rows, columns), expected), name
        assert torch.equal(reader.read_as("deep", (42, 3), slice(4, 11), slice(1, 3)), deep.reshape(42, 3)[4:11, 1:3])


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Neither the rest of the file nor a mapping of it stays with the process."""
    path = pickled(tmp_path, {"small": torch.ones(3), "large": torch.arange(3_000_000.0).reshape(3000, 1000)})

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    with PickleReader(tmp_path) as reader:
        before = read_so_far()
        assert torch.equal(reader.read("large", slice(7, 9))[:, 0], torch.tensor([7000.0, 8000.0]))
        assert 8000 <= read_so_far() - before < 100_000
        assert str(path) not in Path("/proc/self/maps").read_text()


@FORMS
def test_tied_tensors_are_there_under_both_names(archive: bool, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(11, 6), "head": torch.nn.Linear(6, 11, bias=False)})
    model["head"].weight = model["embed"].weight
    pickled(tmp_path, model.state_dict(), archive)
    with PickleReader(tmp_path) as reader:
        assert reader.names == ["embed.weight", "head.weight"]
        assert torch.equal(reader.read("head.weight"), model["embed"].weight)
        assert torch.equal(reader.read("embed.weight", slice(3, 5)), model["embed"].weight[3:5])


@FORMS
def test_several_files_and_their_index(archive: bool, tmp_path: Path) -> None:
    index = pickled_parts(tmp_path, archive)
    with PickleReader(tmp_path) as reader:
        assert sorted(reader.names) == sorted(TENSORS)
        assert equal_bits({name: reader.read(name) for name in TENSORS}, TENSORS)
        assert len(reader._held) == (0 if archive else 1), "files that cannot be mapped are held one at a time"
    good = json.loads(index.read_text())["weight_map"]
    for path in ("pytorch_model-00003-of-00002.bin", "../pytorch_model-00001-of-00002.bin"):
        index.write_text(json.dumps({"weight_map": good | {"extra": path}}))
        assert error_of(tmp_path) == f"{index} names 1 absent file ({path}); download the model again"
    index.write_text(json.dumps({"weight_map": good | {"extra": "pytorch_model-00001-of-00002.bin"}}))
    assert error_of(tmp_path) == f"{index} names 1 tensor (extra) absent from the files; download the model again"
    index.write_text(json.dumps({"weight_map": {name: file for name, file in good.items() if name != "model.norm.weight"}}))
    assert "model.norm.weight" in PickleReader(tmp_path).names, "what the index forgot is still seen"
    index.write_text("{}")
    assert "no weight_map" in error_of(tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    made = CASES["awq"].made()
    write(tmp_path, made.stored, None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never looked at")
    assert sorted(CheckpointReader(tmp_path).names) == sorted(made.stored)
    (tmp_path / "model.safetensors").unlink()
    assert "pytorch_model.bin is truncated or corrupt: it is not a file of torch.save" in error_of(tmp_path)


@pytest.mark.parametrize("case", ["gptq", "awq", "nf4-double", "fp8-ragged-blocks"])
def test_quantised_pickles_are_dequantised_as_safetensors_are(case: str, tmp_path: Path) -> None:
    made = CASES[case].made()
    write(tmp_path, made.stored, CASES[case].settings, CASES[case].dtype)
    with open_checkpoint(tmp_path) as reader:
        expected = reader.read(made.plain)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with open_checkpoint(tmp_path) as reader:
        assert torch.equal(reader.read(made.plain), expected)
        assert torch.equal(reader.read(made.plain, slice(3, 9), slice(2, 8)), expected[3:9, 2:8])


class Malicious:
    """Whoever unpickles this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@FORMS
def test_code_in_a_pickle_does_not_run(archive: bool, tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = pickled(tmp_path / "m", {"w": torch.ones(3), "x": Malicious(made)}, archive)
    for use in (open_checkpoint, lambda folder: open_pickle(folder / "pytorch_model.bin", {})):
        with pytest.raises(ModelError, match=rf"^{path} is a pickle that asks for \w+\.system, which is refused: .*\(weights_only\)") as caught:
            use(tmp_path / "m")
        assert "\n" not in str(caught.value)
    assert not made.exists()
    path.write_bytes(pickle.dumps({"w": Malicious(made)}, protocol=2))
    assert str(path) in error_of(tmp_path / "m")
    assert not made.exists()
    torch.load(pickled(tmp_path / "m", {"x": Malicious(made)}, archive), weights_only=False)
    assert made.exists(), "the trap is a real one"


@FORMS
@pytest.mark.parametrize("entry", [3, {"w": torch.ones(2)}, "text", torch.eye(3).to_sparse(), torch.ones(2, device="meta")], ids=KINDS)
def test_what_is_no_plain_tensor_is_named(entry: Any, archive: bool, tmp_path: Path) -> None:
    path = pickled(tmp_path, {"w": torch.ones(3), "other": entry}, archive)
    assert error_of(tmp_path).startswith(f"{path} holds 1 other thing (other) than plain tensors by name (a state_dict); save the tensors alone")
    pickled(tmp_path, [torch.ones(3)], archive)
    assert error_of(tmp_path).startswith(f"{path} holds a list, wanted tensors by name (a state_dict)")
    pickled(tmp_path, torch.nn.Linear(2, 3), archive)
    assert error_of(tmp_path).startswith(f"{path} is a pickle that asks for torch.nn.modules.linear.Linear, which is refused")


@FORMS
def test_a_file_cut_anywhere_is_one_line(archive: bool, tmp_path: Path) -> None:
    path = pickled(tmp_path, TENSORS, archive)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert error_of(tmp_path).startswith(f"{path} is truncated or corrupt: "), length
        assert error_of(tmp_path).endswith("; download or copy it again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    assert "git lfs pull" in error_of(tmp_path)
    path.write_bytes(whole)
    assert equal_bits({name: PickleReader(tmp_path).read(name) for name in TENSORS}, TENSORS)


def repack(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive anew, with changed entries."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))


def test_an_archive_that_somebody_packed_anew(tmp_path: Path) -> None:
    path = pickled(tmp_path, TENSORS)
    repack(path, lambda name, content: content)
    with PickleReader(tmp_path) as reader:
        assert equal_bits({name: reader.read(name) for name in TENSORS}, TENSORS)
    repack(path, lambda name, content: content[:-2] if name.endswith("/data/3") else content)
    name = list(TENSORS)[3]
    assert f"{name} has {TENSORS[name].nbytes} bytes, of which {TENSORS[name].nbytes - 2} are there" in error_of(tmp_path)
    pickled(tmp_path, TENSORS)
    repack(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert "its entries are compressed" in error_of(tmp_path)


def test_bytes_in_the_other_order(tmp_path: Path) -> None:
    path = pickled(tmp_path, {"w": torch.arange(6.0).reshape(3, 2), "b": torch.tensor([3, -4], dtype=torch.int16)})
    other = "big" if sys.byteorder == "little" else "little"
    sizes = iter((4, 2))

    def turn(name: str, content: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return other.encode()
        if "/data/" not in name:
            return content
        size = next(sizes)
        return b"".join(content[at : at + size][::-1] for at in range(0, len(content), size))

    repack(path, turn)
    with PickleReader(tmp_path) as reader:
        assert torch.equal(reader.read("w", slice(1, 3)), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
        assert reader.read("b").tolist() == [3, -4]


def test_where_the_system_does_not_say_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pickled(tmp_path, TENSORS)
    monkeypatch.setattr(pickles, "_mappings", list)
    assert isinstance(open_pickle(path, {}), HeldFile)
    with PickleReader(tmp_path) as reader:
        assert equal_bits({name: reader.read(name) for name in TENSORS}, TENSORS)


def test_the_notice_is_one_line_for_all_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pickled_parts(tmp_path)
    with caplog.at_level("INFO", logger="mswift"), PickleReader(tmp_path) as reader:
        found: dict[str, Tensor] = {name: reader.read(name) for name in reader.names}
    assert len(found) == len(TENSORS)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("mswift")]
    assert told == [f"{tmp_path}: its weights are pickles; they are read as tensors only (weights_only), and no code in them runs"]
