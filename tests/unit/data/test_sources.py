"""Specs, files and hubs: every row with its file and line, every fault as one line that names them."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.data.registry import Part
from mswift.data.shards import open_shards
from mswift.data.sources import RawRow, SourceSpec, check_sources, parse_spec, read_file, read_source
from mswift.errors import DataError, MissingExtraError

Write = Callable[..., str]


def read(text: str, **kwargs: Any) -> list[RawRow]:
    return list(read_source(parse_spec(text, **kwargs)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/a.jsonl", SourceSpec("data/a.jsonl", "local")),
        ("data/a.jsonl#100", SourceSpec("data/a.jsonl", "local", 100)),
        (" a.json#1 ", SourceSpec("a.json", "local", 1)),
        ("data/*.jsonl#3", SourceSpec("data/*.jsonl", "local", 3)),
        ("/data/dir", SourceSpec("/data/dir", "local")),
        ("hf::org/name", SourceSpec("org/name", "hf")),
        ("ms::org/name#20", SourceSpec("org/name", "ms", 20)),
        ("hf::org/name:main#20@2", SourceSpec("org/name", "hf", 20, ("main",), 2.0)),
        ("ms::org/name:a-1/b@1e-3", SourceSpec("org/name", "ms", None, ("a-1", "b"), 0.001)),
        ("hf::org/name:all", SourceSpec("org/name", "hf", None, ("all",))),
        ("data/a.jsonl@0.7", SourceSpec("data/a.jsonl", "local", None, (), 0.7)),
        ("data/a@b.jsonl", SourceSpec("data/a@b.jsonl", "local")),
        ("C:/data/a:b.jsonl", SourceSpec("C:/data/a:b.jsonl", "local")),
    ],
)
def test_specs(text: str, expected: SourceSpec) -> None:
    assert parse_spec(text) == expected
    assert parse_spec(str(expected)) == expected


def test_a_plain_id_goes_to_modelscope_unless_told_and_a_path_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("USE_HF", raising=False)
    assert parse_spec("org/name#5") == SourceSpec("org/name", "ms", 5)
    assert parse_spec("org/name", use_hf=True).kind == "hf"
    monkeypatch.setenv("USE_HF", "1")
    assert parse_spec("org/name").kind == "hf"
    assert parse_spec("org/name", use_hf=False).kind == "ms"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_spec("org/name") == SourceSpec("org/name", "local")
    (tmp_path / "odd#7").write_text("")
    assert parse_spec("odd#7") == SourceSpec("odd#7", "local")


@pytest.mark.parametrize("number", ["", "0", "-1", "ten", "1.5", "²"])
def test_a_count_is_a_whole_number(number: str) -> None:
    with pytest.raises(DataError) as wrong:
        parse_spec(f"a.jsonl#{number}")
    assert str(wrong.value) == (
        f"--dataset 'a.jsonl#{number}': got {number!r} after #, wanted a whole number of rows of at least 1, such as a.jsonl#500"
    )


@pytest.mark.parametrize("number", ["", "0", "-1", "1e999"])
def test_a_weight_is_a_number_above_0(number: str) -> None:
    with pytest.raises(DataError) as wrong:
        parse_spec(f"a.jsonl#5@{number}")
    assert str(wrong.value) == f"--dataset 'a.jsonl#5@{number}': got {number!r} after @, wanted a weight above 0, such as a.jsonl#5@0.7"


@pytest.mark.parametrize("text", ["", "  ", "#5", "hf::", "ms::#3"])
def test_an_empty_name_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"the name is empty, wanted a path or a hub id"):
        parse_spec(text)


@settings(deadline=None)
@given(st.text(alphabet="abc/._-*", min_size=1, max_size=12), st.integers(1, 10**9))
def test_any_name_keeps_its_count(name: str, count: int) -> None:
    spec = parse_spec(f"{name}#{count}", use_hf=True)
    assert spec.count == count
    assert spec.location == name


def test_jsonl_rows_keep_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe4\xbd\xa0"}\n{"a": 3}')
    rows = read(str(path))
    assert [(row.data["a"], row.line) for row in rows] == [(1, 1), ("你", 4), (3, 5)]
    assert rows[1].where == f"{path}:4"


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.lists(st.text()))), max_size=6), st.sampled_from([None, 0, 3]))
def test_json_lists_give_the_line_on_which_a_row_begins(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    found = list(read_file(str(path)))
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [row.data for row in found] == rows
    assert all(lines[row.line - 1].lstrip(" [").startswith("{") for row in found)


def test_a_json_file_may_hold_a_row_a_line(write_rows: Write) -> None:
    path = write_rows("a.json", [{"a": 1}, {"a": 2}])
    assert [row.data for row in read(path)] == [{"a": 1}, {"a": 2}]
    assert [row.line for row in read(path)] == [1, 2]


ROWS = [{"query": "a,\nb", "response": "é"}, {"query": "c", "response": "d"}]


def write_csv(path: Path) -> None:
    path.write_text('\ufeffquery,response,empty\n"a,\nb",é,\n\nc,d,\n', encoding="utf-8")


def write_tsv(path: Path) -> None:
    path.write_text('query\tresponse\n"a,\nb"\té\n\nc\td\n', encoding="utf-8")


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=1)


def write_arrow(path: Path, writer: Callable[..., Any] = pyarrow.ipc.new_file) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with writer(str(path), table.schema) as file:
        file.write_table(table)


def write_stream(path: Path) -> None:
    write_arrow(path, pyarrow.ipc.new_stream)


def write_compressed(path: Path) -> None:
    with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[path.suffix]) as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())


@pytest.mark.parametrize(
    ("name", "write", "lines"),
    [
        ("a.csv", write_csv, [2, 5]),
        ("a.tsv", write_tsv, [2, 5]),
        ("a.parquet", write_parquet, [1, 2]),
        ("a.arrow", write_arrow, [1, 2]),
        ("b.arrow", write_stream, [1, 2]),
        ("a.jsonl.gz", write_compressed, [1, 2]),
        ("a.jsonl.zst", write_compressed, [1, 2]),
        ("a.json.bz2", write_compressed, [1, 2]),
    ],
)
def test_every_kind_of_file(name: str, write: Callable[[Path], None], lines: list[int], tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    rows = read(str(path))
    assert [row.data for row in rows] == ROWS
    assert [row.line for row in rows] == lines
    assert rows == read(str(tmp_path)), "a folder finds it"
    check_sources([str(path)])


def test_plain_text_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \r\n", encoding="utf-8")
    assert [(row.data, row.line) for row in read(str(tmp_path / "a.txt"))] == [({"text": "one"}, 1), ({"text": " two "}, 3)]


def test_bad_lines_can_be_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"\n[]\n\xff\n{"a": 5}\n')
    bad: list[DataError] = []
    assert [row.line for row in read_source(parse_spec(str(path)), on_bad=bad.append)] == [1, 5]
    assert [str(error).split(": ")[0] for error in bad] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert "(byte 17 of the file)" in str(bad[2])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding_is_one_fault_and_not_one_a_line(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"a": 1}\n{"a": 2}\n{"a": 3}\n'.encode(encoding))
    bad: list[DataError] = []
    with pytest.raises(DataError, match=r":1: not UTF-8: byte 0x\w\w at column [12] .* iconv -f UTF-(16|16LE|16BE|32) -t UTF-8$"):
        list(read_source(parse_spec(str(path)), on_bad=bad.append))
    assert bad == []
    with pytest.raises(DataError, match=":1: not UTF-8"):
        open_shards(Part(parse_spec(str(path))))


def test_directories_and_globs_in_the_order_of_names(write_rows: Write, tmp_path: Path) -> None:
    for name in ("d/b.jsonl", "d/a.jsonl", "d/sub/c.jsonl", "d/ignored.json", "d/.checkpoints/a.jsonl"):
        write_rows(name, [{"name": name}])
    assert [row.data["name"] for row in read(str(tmp_path / "d"))] == ["d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl"]
    assert [row.data["name"] for row in read(str(tmp_path / "d" / "*.jsonl"))] == ["d/a.jsonl", "d/b.jsonl"]
    assert [row.data["name"] for row in read(str(tmp_path / "d" / "ignored.json"))] == ["d/ignored.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "{path}:2: not JSON: Expecting value at column 6; "),
        ("a.jsonl", b'{"a": 1}\n[1]\n', '{path}:2: a row is a JSON object, got list; wanted something like {{"messages": [...]}}'),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "caf\xe9"}\n',
            "{path}:2: not UTF-8: byte 0xe9 at column 11 (byte 19 of the file); convert the file with iconv -t UTF-8",
        ),
        ("a.json", b'[{"a": 1},\n {"a": 2}', "{path}:2: not JSON: wanted ',' or ']' after a row, got 'the end of the file'; "),
        ("a.json", b'[{"a": 1},\n]', "{path}:2: not JSON: Expecting value at column 1; "),
        ("a.json", b"[{},\n{}] x", "{path}:2: not JSON: wanted the end of the file after the list, got 'x'; "),
        ("a.json", b"[{},\n\n 5]", "{path}:3: a row is a JSON object, got int; "),
        (
            "a.xlsx",
            b"a,b\n",
            "{path}: cannot read .xlsx files, wanted one of .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow (also as .gz",
        ),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "{path}:3: has 3 cells, the first line has 2 names; put quotes around cells with commas"),
        ("a.csv", b'a,b\n1,"2\n', "{path}:2: not csv: unexpected end of data; put quotes around commas and line breaks"),
        ("a.csv", b"a,b\n1,\xe9\n", "{path}:2: not UTF-8: byte 0xe9 at column 3 (byte 6 of the file); "),
        (
            "a.txt",
            "h\u00e9".encode("utf-16"),
            "{path}:1: not UTF-8: byte 0xff at column 1 (byte 0 of the file); convert the file with iconv -f UTF-16 -t ",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 2}\n'.encode("utf-16-be"),
            "{path}:1: not UTF-8: byte 0x00 at column 1 (byte 0 of the file); convert the file with iconv -f UTF-16BE -t ",
        ),
        (
            "a.csv",
            "a,b\n1,2\n".encode("utf-16-le"),
            "{path}:1: not UTF-8: byte 0x00 at column 2 (byte 1 of the file); convert the file with iconv -f UTF-16LE -t ",
        ),
        (
            "a.json",
            "[{}]".encode("utf-32"),
            "{path}:1: not UTF-8: byte 0xff at column 1 (byte 0 of the file); convert the file with iconv -f UTF-32 -t ",
        ),
        ("a.parquet", b"PAR1", "{path}: not parquet, or damaged: "),
        ("a.arrow", b"ARROW", "{path}: not arrow, or damaged: "),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "{path}: cannot be read: "),
    ],
)
def test_faults_of_a_file_are_one_line_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as wrong:
        read(str(path))
    assert str(wrong.value).startswith(message.format(path=path))
    assert "\n" not in str(wrong.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such data file or directory \(looked in .*\); check --dataset and --val_dataset$"):
        read(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match=r"x\*\.jsonl: no file matches this pattern; check --dataset and --val_dataset$"):
        read(str(tmp_path / "x*.jsonl"))
    with pytest.raises(DataError, match=r"the directory holds no file that is read \(\.jsonl, .*\); check --dataset and --val_dataset$"):
        read(str(tmp_path))


def test_a_local_path_contacts_nothing(write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> NoReturn:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert [row.data for row in read(write_rows("a.jsonl", [{"a": 1}]), use_hf=True)] == [{"a": 1}]


def test_a_hub_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(MissingExtraError) as missing:
        read("ms::org/name")
    assert str(missing.value) == "modelscope is not installed: it is needed here; install it with pip install 'mswift[modelscope]'"
    assert (missing.value.library, missing.value.extra) == ("modelscope", "modelscope")


def offline_datasets(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_hub_rows_come_through_the_datasets_library(write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_datasets(monkeypatch, tmp_path / "cache")
    write_rows("hub/train.jsonl", [{"query": "a", "response": "b"}, {"query": "c", "response": "d"}])
    rows = read(f"hf::{tmp_path / 'hub'}")
    assert [row.data for row in rows] == [{"query": "a", "response": "b"}, {"query": "c", "response": "d"}]
    assert rows[1].where == f"hf::{tmp_path / 'hub'}:2"
    for name in ("x", "y"):
        write_rows(f"two/{name}/train.jsonl", [{"name": name}])
    (tmp_path / "two" / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files: x/*.jsonl\n- config_name: y\n  data_files: y/*.jsonl\n---\n"
    )
    two = f"hf::{tmp_path / 'two'}"
    assert [row.data["name"] for row in read(f"{two}:y/x")] == ["y", "x"]
    assert [row.where for row in read(f"{two}:all")] == [f"{two}:all:1", f"{two}:all:2"]
    with pytest.raises(DataError, match=r"two: has 2 subsets \(x, y\), wanted one or more: .*two:x, or .*two:all$"):
        read(two)
    with pytest.raises(
        DataError, match=r"^hf::org/not-there: cannot be loaded from the hub: .*; there is no local file or directory of this name either$"
    ):
        read("hf::org/not-there")


def test_a_hub_that_cannot_be_reached_is_said_in_short(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    library = pytest.importorskip("modelscope.hub.snapshot_download")

    def download(name: str) -> str:
        logging.getLogger("modelscope_hub.legacy_api").warning("retry in 1s")
        try:
            raise ConnectionError("HTTPSConnectionPool(host='x', port=443): Max retries exceeded with url: /a")
        except ConnectionError as error:
            raise RuntimeError("[E1020] Connection failed") from error

    monkeypatch.setattr(library, "dataset_snapshot_download", download)
    with pytest.raises(DataError) as refused:
        read("ms::org/name")
    assert str(refused.value) == (
        "ms::org/name: cannot be loaded from the hub: it could not be reached; check the network, or put the files here and give their path; "
        "there is no local file or directory of this name either"
    )
    assert caplog.text == ""


def test_an_element_of_a_json_list_that_is_no_row_is_one_bad_row(tmp_path: Path) -> None:
    path, faults = tmp_path / "a.json", list[DataError]()
    path.write_text('[{"a": 1},\n 3,\n {"a": 2}]')
    assert [row.data for row in read_file(str(path), faults.append)] == [{"a": 1}, {"a": 2}]
    assert [str(fault).split("; ")[0] for fault in faults] == [f"{path}:2: a row is a JSON object, got int"]


def test_modelscope_rows_come_through_a_local_copy(write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_datasets(monkeypatch, tmp_path / "cache")
    library = pytest.importorskip("modelscope.hub.snapshot_download")
    errors = pytest.importorskip("modelscope.hub.errors")
    write_rows("copy/train.jsonl", [{"query": "a", "response": "b"}])

    def download(name: str) -> str:  # the network is what is left out
        if name != "org/name":
            raise errors.NotExistError(f"no {name}")
        return str(tmp_path / "copy")

    monkeypatch.setattr(library, "dataset_snapshot_download", download)
    rows = read("org/name", use_hf=False)
    assert [(row.data, row.where) for row in rows] == [({"query": "a", "response": "b"}, "ms::org/name:1")]
    with pytest.raises(DataError, match=r"^ms::org/other: cannot be loaded from the hub: .*no org/other.*; there is no local file"):
        read("ms::org/other")
