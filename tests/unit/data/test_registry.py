"""Data sets by name: registered by a plugin, or described in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mswift.data import load_dataset
from mswift.data.registry import forget_all, load_infos, load_plugins, register_dataset, resolve
from mswift.data.specs import SourceSpec
from mswift.errors import ConfigError, DataError

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    forget_all()


def describe(tmp_path: Path, *entries: dict[str, Any]) -> list[str]:
    path = tmp_path / "info.json"
    path.write_text(json.dumps(entries), encoding="utf8")
    return [str(path)]


def test_a_plugin_makes_rows(write_rows: Write, tmp_path: Path) -> None:
    path = write_rows("odd.jsonl", [{"n": 1}, {"n": 0}, {"n": 2}])
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from mswift.data import register_dataset\n\n"
        "def rows(row):\n"
        "    return [{'query': f'{row[\"n\"]}.{i}', 'response': 'r'} for i in range(row['n'])] or None\n\n"
        f"register_dataset('odd', path={path!r}, preprocess=rows)\n"
    )
    load_plugins([str(plugin)])
    for name in ("odd", path):
        rows = load_dataset([name])
        assert [row.messages[0]["content"] for row in rows] == ["1.0", "2.0", "2.1"]
        assert [row.line for row in rows] == [1, 3, 3], "every row keeps its place"
    assert len(load_dataset(["odd#7"])) == 7


def test_what_a_plugin_raises_is_said_with_its_place(write_rows: Write, tmp_path: Path) -> None:
    path = write_rows("odd.jsonl", [{"n": 1}])
    register_dataset("odd", path=path, preprocess=lambda row: row["absent"])
    with pytest.raises(DataError, match=r"odd\.jsonl:1: its preprocessor failed: KeyError: 'absent'; mend it, or the row$"):
        load_dataset(["odd"], strict=True)
    register_dataset("odd", path=path, preprocess=lambda row: [5])  # type: ignore[arg-type,return-value,list-item]
    with pytest.raises(DataError, match=r"its preprocessor gave a list of 1, wanted a row, a list of rows or None"):
        load_dataset(["odd"], strict=True)
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match=r"^--external_plugins .*bad\.py: ModuleNotFoundError: .*; mend the file$"):
        load_plugins([str(tmp_path / "bad.py")])
    with pytest.raises(ConfigError, match=r"^--external_plugins no\.py: there is no such Python file; check the path$"):
        load_plugins(["no.py"])


def test_a_description_names_columns_roles_and_subsets(write_rows: Write, tmp_path: Path) -> None:
    write_rows("x/a.jsonl", [{"talk": [{"who": "Q", "says": "q"}, {"who": "A", "says": "a"}]}])
    messages = {"role_key": "who", "content_key": "says", "user_role": "Q", "assistant_role": "A"}
    load_infos(describe(tmp_path, {"dataset_path": "x/a.jsonl", "dataset_name": "talks", "columns": {"talk": "messages"}, "messages": messages}))
    assert load_dataset(["talks"])[0].messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    load_infos(
        describe(
            tmp_path,
            {
                "ms_dataset_id": "org/a",
                "hf_dataset_id": "org2/b",
                "split": ["validation"],
                "subsets": ["default", {"name": "short", "subset": "s-1", "split": ["test"], "columns": {"x": "query"}}],
            },
        )
    )
    spec, parts = resolve("hf::org2/b:short#5@2")
    assert (spec.count, spec.weight) == (5, 2.0)
    assert [(part.spec, part.split, part.columns) for part in parts] == [(SourceSpec("org2/b", "hf", None, ("s-1",)), "test", {"x": "query"})]
    assert [part.spec.subsets for part in resolve("org/a", use_hf=False)[1]] == [("default",), ("s-1",)]
    assert {part.spec.kind for part in resolve("org/a", use_hf=False)[1]} == {"ms"}
    with pytest.raises(DataError, match=r"^hf::org2/b:long: there is no subset long, wanted one of default, short$"):
        resolve("hf::org2/b:long")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"dataset_paht": "a"}], "entry 1 has the key dataset_paht, wanted some of ms_dataset_id, hf_dataset_id, dataset_path, "),
        ([{"dataset_name": "a"}], "entry 1 has the keys dataset_name, wanted dataset_path, hf_dataset_id or ms_dataset_id"),
        ([{"dataset_path": "a", "columns": ["a"]}], "entry 1: columns is a list of 1, wanted an object of names"),
        ([{"dataset_path": "a", "messages": {"who": "a"}}], "entry 1: messages has the key who, wanted some of role_key, "),
    ],
)
def test_wrong_descriptions(entries: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        load_infos(describe(tmp_path, *entries))
    assert f"info.json: {message}" in str(wrong.value)
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no\.json: cannot be read: .*; wanted a JSON list of data sets$"):
        load_infos([str(tmp_path / "no.json")])
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no\.json: got an object with the keys \(none\), wanted a list such as"):
        load_infos([str(tmp_path / "no.json")])
