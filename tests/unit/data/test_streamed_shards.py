"""The index of every kind of file, and rows out of the middle of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from mswift.data.files import RawRow
from mswift.data.registry import Part
from mswift.data.shards import LINES_OF_A_CHUNK, ChunkReader, Item, Shards, open_shards
from mswift.data.specs import parse_spec
from mswift.errors import DataError

ROWS = [{"query": f"q{i}", "response": "é" * (i % 7)} for i in range(150)]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + (b"\n\n \n" if i % 10 == 3 else b"\n") for i, row in enumerate(rows))


def write_compressed(path: Path) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(lines_of(ROWS))


def write_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=40)


FILES: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(lines_of(ROWS)),
    "b.json": lambda path: path.write_bytes(lines_of(ROWS)),
    "c.json": lambda path: path.write_text(json.dumps(ROWS, indent=0)),
    "a.jsonl.zst": write_compressed,
    "a.csv": lambda path: path.write_text("query,response\n" + "".join(f'"{row["query"]}","{row["response"]}"\n' for row in ROWS)),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=40),
    "a.arrow": write_arrow,
}


def open_one(path: Path) -> Shards:
    return open_shards(Part(parse_spec(str(path))))


def all_rows(shards: Shards) -> list[Item]:
    return [item for chunk, count in enumerate(shards.chunks.rows.tolist()) for item in ChunkReader(shards).read(chunk, 0, count)]


@pytest.mark.parametrize("name", FILES)
def test_chunks_hold_every_row_once_in_order(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    shards = open_one(tmp_path / name)
    assert shards.num_rows == len(ROWS)
    items = all_rows(shards)
    found = [{"response": "", **item.data} for item in items if isinstance(item, RawRow)]
    assert found == ROWS
    assert [item.line for item in items if isinstance(item, RawRow)] == sorted({item.line for item in items if isinstance(item, RawRow)})
    assert shards.can_seek == (name in ("a.jsonl", "b.json", "a.arrow"))


@pytest.mark.parametrize("name", FILES)
def test_rows_out_of_the_middle_in_any_order(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    shards = open_one(tmp_path / name)
    whole = all_rows(shards)
    reader, begins = ChunkReader(shards), [0, *shards.chunks.rows.cumsum().tolist()]
    for chunk, first, count in ((0, 5, 7), (0, 20, 3), (0, 2, 2), (len(begins) - 2, 1, 4), (0, 0, 1)):
        begin = begins[chunk] + first
        assert reader.read(chunk, first, count) == whole[begin : begin + count]


def test_an_index_is_small_and_faults_keep_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 0}\n' + b'{"a": 1}\n' * 200 + b'{"a"\n\xff\n\xe3\x80\x80\n{"a": 2}')
    shards = open_one(path)
    assert len(shards.chunks.rows) == -(-205 // LINES_OF_A_CHUNK)
    items = all_rows(shards)
    assert [type(item).__name__ for item in items[-4:]] == ["DataError", "DataError", "NoneType", "RawRow"]
    assert str(items[-4]).startswith(f"{path}:202: not JSON: ")
    assert "(byte 1817 of the file)" in str(items[-3])
    assert path.read_bytes()[1817] == 0xFF
    assert isinstance(items[-1], RawRow)
    assert items[-1].where == f"{path}:205"


def test_processes_share_the_files(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_bytes(lines_of(ROWS[: 10 + i]))
    part = Part(parse_spec(str(tmp_path)))
    alone = open_shards(part)
    seen: list[list[int]] = []
    found: list[Any] = []
    for rank in (1, 0):  # what the others find is taken from the loop before
        shards = open_shards(part, exchange=lambda mine: (found.insert(0, mine), found)[1], rank=rank, world=2) if rank == 0 else None
        if shards is None:
            with pytest.raises(DataError, match="holds no rows"):
                open_shards(part, exchange=lambda mine: (found.append(mine), [[]])[1], rank=rank, world=2)
    assert shards is not None
    seen = [[number for number, _ in one] for one in found]
    assert seen == [[0, 2, 4], [1, 3]]
    assert shards.fingerprint() == alone.fingerprint()
    with pytest.raises(DataError, match="damaged over there"):
        open_shards(part, exchange=lambda mine: [mine, DataError("damaged over there")])


def test_a_file_that_shrinks_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(ROWS))
    shards = open_one(path)
    path.write_bytes(lines_of(ROWS[:3]))
    with pytest.raises(DataError, match=r"a\.jsonl: has fewer rows than when the run began; leave data alone while it is read$"):
        all_rows(shards)
    assert shards.fingerprint() != open_one(path).fingerprint()
