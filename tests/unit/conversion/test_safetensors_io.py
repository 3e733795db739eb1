"""Reading and writing safetensors: against the safetensors library, and every way in which a file or a directory can be wrong."""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mswift.conversion.safetensors_io import CheckpointReader, SafetensorsFile, ShardWriter, TensorSpec, listing, save_file
from mswift.errors import ConversionError, ModelError
from tests.unit.conversion.synthetic import Model, equal_bits, write_checkpoint

ALL_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
)


def of_every_dtype() -> dict[str, torch.Tensor]:
    """Random bytes, so NaN patterns are among them; shapes of 0 to 4 dimensions, one without elements."""
    shapes = [(), (3,), (2, 5), (2, 3, 4), (1, 2, 3, 2), (0, 4)]
    tensors = {}
    for index, dtype in enumerate(ALL_DTYPES):
        shape = shapes[index % len(shapes)]
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
        tensors[f"layer.{index}"] = raw.view(dtype).reshape(shape)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def single_file_model(directory: Path, content: bytes | None = None) -> Path:
    (directory / "config.json").write_text("{}")
    save_file(directory / "model.safetensors", {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)})
    if content is not None:
        (directory / "model.safetensors").write_bytes(content)
    return directory


def test_what_we_write_the_library_reads(tmp_path: Path) -> None:
    tensors = of_every_dtype()
    save_file(tmp_path / "ours.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape for name, tensor in tensors.items())
    assert all(bits(theirs[name]) == bits(tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (tmp_path / "ours.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    starts = {name: header[name]["data_offsets"][0] for name in tensors}
    assert all(start % tensors[name].dtype.itemsize == 0 for name, start in starts.items())


def test_what_the_library_writes_we_read(tmp_path: Path) -> None:
    tensors = of_every_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"who": "they"})
    file = SafetensorsFile(tmp_path / "theirs.safetensors")
    assert file.metadata == {"who": "they"}
    assert file.specs == {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        file.read_into(name, out)
        assert bits(out) == bits(tensor)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([(), (3,)]), st.data())
def test_slices_are_those_of_torch(tmp_path: Path, rows: int, columns: int, rest: tuple[int, ...], data: st.DataObject) -> None:
    tensor = torch.randn(rows, columns, *rest)
    single_file_model(tmp_path)
    save_file(tmp_path / "model.safetensors", {"x": tensor})
    cuts = [st.none() | st.builds(slice, st.integers(0, size), st.integers(0, size)) for size in (rows, columns)]
    row_cut, column_cut = data.draw(cuts[0]), data.draw(cuts[1])
    with CheckpointReader(tmp_path) as reader:
        got = reader.read("x", row_cut, column_cut)
    assert torch.equal(got, tensor[row_cut or slice(None), column_cut or slice(None)])


def test_a_checkpoint_of_several_files(tmp_path: Path) -> None:
    tensors = Model().tensors()
    with CheckpointReader(write_checkpoint(tmp_path, tensors)) as reader:
        assert sorted(reader.names) == sorted(tensors)
        assert "lm_head.weight" in reader
        assert "nothing" not in reader
        assert reader.shape("lm_head.weight") == (37, 12)
        assert reader.dtype("lm_head.weight") == torch.bfloat16
        assert reader.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert equal_bits({name: reader.read(name) for name in tensors}, tensors)


def test_tensors_that_the_index_forgot_are_still_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Model().tensors())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.norm.weight" in CheckpointReader(tmp_path).names


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 20, 100, -60, -1])
def test_a_truncated_file_is_seen_at_open(tmp_path: Path, keep: int) -> None:
    whole = (single_file_model(tmp_path) / "model.safetensors").read_bytes()
    single_file_model(tmp_path, whole[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors is truncated or corrupt: .*copy it again") as caught:
        CheckpointReader(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        b"\xff\xfe" * 4,
        b"[" * 100_000,
    ],
)
def test_a_corrupt_header_is_one_line(tmp_path: Path, header: bytes) -> None:
    single_file_model(tmp_path, len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match="truncated or corrupt") as caught:
        CheckpointReader(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_content_is_named(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}'
    single_file_model(tmp_path, len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"unknown type \(F4\)"):
        CheckpointReader(tmp_path)
    single_file_model(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        CheckpointReader(tmp_path)


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path: Path) -> None:
    reader = CheckpointReader(single_file_model(tmp_path))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 40)
    with pytest.raises(ModelError, match="became shorter"):
        [reader.read(name) for name in reader.names]


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    def error() -> str:
        with pytest.raises(ModelError) as caught:
            CheckpointReader(tmp_path / "model")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in error()
    (tmp_path / "model").mkdir()
    assert "is empty" in error()
    (tmp_path / "model" / "README.md").write_text("")
    assert "no config.json" in error()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "no model.safetensors" in error()
    (tmp_path / "model" / "consolidated.00.pth").write_bytes(b"")
    assert "has 1 pickle (consolidated.00.pth) but no model.safetensors, pytorch_model.bin or index" in error()
    assert "in the form that transformers reads" in error()
    (tmp_path / "model" / "part-1.safetensors").write_bytes(b"")
    assert "(part-1.safetensors) but neither" in error()
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "no weight_map" in error()
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        CheckpointReader(tmp_path / "file")


def test_an_index_at_odds_with_its_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Model().tensors())
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for path in ("model-00003-of-00003.safetensors", "../model-00001-of-00002.safetensors"):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {"extra": path}}))
        with pytest.raises(ModelError, match=rf"names 1 absent file \({path}\)"):
            CheckpointReader(tmp_path)
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"extra": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"names 1 tensor \(extra\) absent from the files"):
        CheckpointReader(tmp_path)


def test_rows_in_any_order(tmp_path: Path) -> None:
    tensor = torch.randn(7, 3)
    with ShardWriter(tmp_path / "x.safetensors", {"x": TensorSpec(torch.float32, (7, 3)), "y": TensorSpec(torch.int8, (2,))}) as writer:
        assert writer.write("x", tensor[4:], 4) == 3 * 3 * 4
        writer.write("y", torch.tensor([1, 2], dtype=torch.int8))
        writer.write("x", tensor.t().contiguous().t()[:4], 0)  # not contiguous
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x.safetensors")["x"], tensor)


@given(rows=st.integers(1, 5), columns=st.integers(1, 7), rest=st.sampled_from([(), (2,)]), data=st.data())
def test_columns_from_several_writers(rows: int, columns: int, rest: tuple[int, ...], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, columns))
    tensor = torch.randint(-99, 99, (rows, columns, *rest), dtype=torch.int16)
    specs = {"w": TensorSpec(torch.float32, (1,)), "x": TensorSpec(torch.int16, tuple(tensor.shape))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        writer = ShardWriter(path, specs)
        other = ShardWriter(path, specs, join=True)
        writer.write("w", torch.ones(1))
        assert other.write("x", tensor[:, cut:], columns=(cut, columns)) == tensor[:, cut:].nbytes
        writer.write("x", tensor[:, :cut], columns=(0, cut))
        other.close()
        writer.close([other.written])
        assert torch.equal(safetensors.torch.load_file(path)["x"], tensor)


def test_advice_changes_no_value(tmp_path: Path) -> None:
    tensor = torch.randn(700, 30)
    save_file(tmp_path / "model.safetensors", {"x": tensor})
    (tmp_path / "config.json").write_text("{}")
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read("x"), tensor)
        reader.advise("x", slice(100, 500), "done")
        reader.advise("x", None, "soon")
        assert torch.equal(reader.read("x", slice(50, 650)), tensor[50:650])


def test_a_writer_that_is_misused_leaves_no_file(tmp_path: Path) -> None:
    path, specs = tmp_path / "x.safetensors", {"x": TensorSpec(torch.float32, (4, 3))}
    for tensor, row in ((torch.zeros(4, 3, dtype=torch.bfloat16), 0), (torch.zeros(4, 2), 0), (torch.zeros(2, 3), 3)):
        with pytest.raises(ConversionError, match="x wants"), ShardWriter(path, specs) as writer:
            writer.write("x", tensor, row)
        assert not path.exists()
    for width, columns in ((2, (0, 3)), (2, (2, 4)), (3, (0, 2))):
        with pytest.raises(ConversionError, match="x wants"), ShardWriter(path, specs) as writer:
            writer.write("x", torch.zeros(4, width), 0, columns)
        assert not path.exists()
    with pytest.raises(ConversionError, match=r"1 incomplete tensor \(x\)"), ShardWriter(path, specs) as writer:
        writer.write("x", torch.zeros(3, 3))
    assert not path.exists()
    with pytest.raises(ConversionError, match="cannot write"):
        ShardWriter(tmp_path / "absent" / "x.safetensors", specs)


def test_no_space_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the kernel refuses to let a file grow past this
    try:
        with pytest.raises(ConversionError, match=r"cannot write .*x.safetensors: File too large; free some space"):
            save_file(tmp_path / "x.safetensors", {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_listing_counts_what_it_does_not_show() -> None:
    assert listing("tensor", ["b", "a"]) == "2 tensors (a, b)"
    assert listing("tensor", "a") == "1 tensor (a)"
    assert listing("tensor", map(str, range(10, 20))).endswith("17 and 2 more)")
