"""``mswift data``: the three forms of its output, and that it starts nothing and needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mswift import cli
from tests.unit.templates.registry import WEATHER, assistant, call, tokenizer_for, user

ROWS = [
    {"messages": [user("What is it?"), assistant("<think>\nso\n</think>\n\nIt is."), user("And now?"), assistant("Not.")]},
    {"messages": [user("Weather?"), assistant("", tool_calls=[call("get_weather", city="Rome")])], "tools": [WEATHER]},
    {"messages": [user("x"), assistant("y", loss=False)]},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model without weights, and rows."""
    tokenizer_for("qwen3").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    for name in ("NPROC_PER_NODE", "NNODES", "RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*flags: str) -> int:
    return cli.main(["data", "--model", "m", "--dataset", "rows.jsonl", *flags])


def test_json_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [(record["source"], record["row"]) for record in records] == [("rows.jsonl", 1), ("rows.jsonl", 1), ("rows.jsonl", 2)]
    assert all(len(record["input_ids"]) == len(record["weights"]) for record in records)
    assert "get_weather" in records[2]["text"]
    assert "error: rows.jsonl:3: no assistant turn to train on" in err
    assert run("--json", "--inspect", "1", "--template", "alpaca") == 0
    out = capsys.readouterr().out
    assert "### Response:" in json.loads(out)["text"]


def test_both_answers_of_preference_rows_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a good one", "rejected": "a bad one"}) + "\n")
    assert run("--json") == 0
    out = capsys.readouterr().out
    assert [(record["row"], record["side"]) for record in map(json.loads, out.splitlines())] == [(1, "chosen"), (1, "rejected")]
    assert run() == 0
    out = capsys.readouterr().out
    assert "rows.jsonl:1, rejected: " in out
    assert "a bad one<|im_end|>" in out


@pytest.mark.parametrize("form", [(), ("--json",), ("--html", "page.html")])
def test_rows_of_which_none_is_taken_are_an_error(folder: Path, capsys: pytest.CaptureFixture[str], form: tuple[str, ...]) -> None:
    (folder / "rows.jsonl").write_text((json.dumps(ROWS[2]) + "\n") * 5)
    assert run(*form) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: none of the 5 rows can be used: rows.jsonl:1: no assistant turn to train on")
    assert last.endswith(" | and 2 more; mend them, or give another --template")
    assert err.count("error") == 1
    assert not (folder / "page.html").exists()


def test_terminal_and_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--inspect", "2") == 0
    out = capsys.readouterr().out
    assert "rows.jsonl:1, part 2 of 2: " in out
    assert "Not.<|im_end|>" in out
    assert run("--html", "page.html") == 0
    assert "3 training rows of 3 rows in page.html" in capsys.readouterr().out
    assert (folder / "page.html").read_text(encoding="utf8").count("<section>") == 4


def test_empty_reasoning_of_hybrid_models_counts_only_if_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = []
    for flags in ((), ("--disable_ignore_empty_think",)):
        assert run("--json", "--inspect", "2", *flags) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[2])
        trained.append(sum(weight > 0 for weight in record["weights"]))
    assert 0 < trained[0] < trained[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--template", "quen3"), "error: --template quen3 is unknown; did you mean qwen3? (without the flag the checkpoint's own is used)\n"),
        (("--template", "llama3"), "error: --template llama3 needs <|end_header_id|>, <|eot_id|>, <|start_header_id|>, which the tokenizer of m"),
        (("--loss_scale", "herms"), "error: --loss_scale: 'herms' is unknown"),
        (("--html", "a.html", "--json"), "error: --html and --json were given, wanted one of them\n"),
        (("--html", "rows.jsonl/a.html"), "error: --html "),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    assert run(*flags) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert err.count("\n") == 1


def test_several_processes_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert run() == 2
    assert capsys.readouterr().err == "error: mswift data runs in one process, got 2; leave NPROC_PER_NODE and srun out\n"
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    assert run("--inspect", "1") == 0
    assert "rows.jsonl:1" in capsys.readouterr().out
