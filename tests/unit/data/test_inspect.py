"""Rows as they are shown: every token with its text and weight, in each of the three forms."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from mswift.data.inspect import Shown, first_rows, inspect_rows, legend, split_text, to_html, to_json, to_terminal
from mswift.data.loading import ReadSettings
from mswift.errors import DataError
from mswift.templates import ChatTemplate
from tests.unit.templates.registry import tokenizer_for

TEXT = "Grüße 🙂🙃 你好 <b>&amp;</b>\n  x"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Action: go\nObservation: no"}]},
        {"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "b", "loss": False}]},
        {"query": "3", "response": "c"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    return path


def shown(file: Path, name: str = "qwen2_5", kind: str = "byte_level", count: int = 3) -> list[Shown | DataError]:
    template = ChatTemplate(tokenizer_for(name, kind), loss_scale="react")
    return inspect_rows(first_rows([str(file)], ReadSettings(), count)[0], template, max_length=30)


def test_only_the_first_rows_are_read_and_faults_keep_their_place(file: Path) -> None:
    first, second, third = shown(file)
    assert isinstance(first, Shown)
    assert isinstance(second, DataError)
    assert isinstance(third, Shown)
    assert str(second) == f"{file}:2: no assistant turn to train on; every training row needs one"
    assert (first.source, first.row, third.row, first.part, first.parts) == (str(file), 1, 3, 1, 1)
    assert first.title.endswith(" trained (longer than 30)")
    with pytest.raises(DataError):
        shown(file, count=4)
    with pytest.raises(DataError, match="holds no rows; check --dataset"):
        first_rows([str(file.with_name("b.jsonl"))], ReadSettings(), 1) if file.with_name("b.jsonl").write_text("\n") else None


def test_every_source_is_shown_and_what_was_recognised_of_it_is_said(file: Path) -> None:
    other = file.with_name("b.jsonl")
    other.write_text("".join(json.dumps({"problem": f"p{i}", "answer": "x", "level": 1}) + "\n" for i in range(9)))
    rows, lines = first_rows([str(file), f"{other}#2"], ReadSettings(), 5)
    assert [(row.source, row.line) for row in rows] == [(str(file), 1), (str(file), 2), (str(file), 3), (str(other), 1), (str(other), 2)]
    assert lines == [
        f"the first of {file}: 2 rows of messages, 1 row of query/response",
        f"the first of {other}: 2 rows of query/response; problem read as query, answer read as response; kept: level",
    ]
    rows, _ = first_rows([f"{other}#1", str(file)], ReadSettings(), 3)
    assert [(row.source, row.line) for row in rows] == [(str(other), 1), (str(file), 1), (str(file), 2)]


@pytest.mark.parametrize("kind", ["byte_level", "split_byte_level", "metaspace"])
def test_pieces_are_one_a_token_and_make_up_the_text(file: Path, kind: str) -> None:
    first = shown(file, kind=kind)[0]
    assert isinstance(first, Shown)
    assert len(first.pieces) == len(first.encoded)
    template = ChatTemplate(tokenizer_for("qwen2_5", kind))
    text = "".join(first.pieces)
    assert text == template.decode(first.encoded.input_ids)
    assert "🙂🙃 你好" in text
    assert "\ufffd" not in text
    assert split_text(template, []) == ()


def test_json_holds_ids_weights_and_text(file: Path) -> None:
    first = shown(file)[0]
    assert isinstance(first, Shown)
    record = json.loads(to_json(first))
    assert list(record) == ["source", "row", "input_ids", "weights", "text"]
    assert record["input_ids"] == first.encoded.input_ids
    assert set(record["weights"]) == {0.0, 1.0, 2.0}
    assert TEXT in record["text"]


def test_the_terminal_shows_all_text_and_marks_weights(file: Path) -> None:
    first = shown(file)[0]
    assert isinstance(first, Shown)
    text = to_terminal(first)
    assert re.sub(r"\[x[0-9.]+\]", "", text.plain) == f"{first.title}\n{''.join(first.pieces)}"
    assert "[x2]Action: go\nObservation:" in text.plain
    styles = {str(span.style) for span in text.spans}
    assert {"dim", "bold green", "bold magenta", "reverse"} <= styles
    assert "trained" in legend().plain


def test_the_page_stands_alone_and_has_every_token(file: Path) -> None:
    made = shown(file)
    page = to_html(made, "m: <a.jsonl>")
    assert "m: &lt;a.jsonl&gt;" in page
    assert not re.search(r"(?:src|href)=|@import|url\(", page)
    first = made[0]
    assert isinstance(first, Shown)
    tokens = re.findall(r'<i(?: class=(\w))? title="id (\d+), weight ([\d.]+)">(.*?)</i>', page, re.DOTALL)
    mine = tokens[: len(first.encoded)]
    assert [int(token[1]) for token in mine] == first.encoded.input_ids
    assert [float(token[2]) for token in mine] == first.encoded.weights
    assert html.unescape("".join(token[3] for token in mine)).replace("\u21b5", "") == "".join(first.pieces)
    assert {token[0] for token in mine} == {"", "t", "m"}
    assert "every training row needs one" in page


def test_both_answers_of_a_preference_row_are_shown(file: Path) -> None:
    asked = {"role": "user", "content": "q"}
    whole = [[asked, {"role": "assistant", "content": content}] for content in ("<good>", "bad")]
    rows = [
        {"messages": whole[0], "rejected_response": "bad"},
        {"messages": whole[0], "rejected_messages": whole[1]},
        {"prompt": "q", "chosen": "<good>", "rejected": "bad"},
        {"chosen": whole[0], "rejected": whole[1]},
        {"query": "q", "response": "only", "rejected": None},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, lines = first_rows([str(file)], ReadSettings(), 5)
    assert "1 row of messages, rejected_response" in lines[0]
    template = ChatTemplate(tokenizer_for("qwen2_5"))
    made = inspect_rows(found, template)
    assert [(one.row, one.side) for one in made if isinstance(one, Shown)] == [
        *((row, side) for row in range(1, 5) for side in ("chosen", "rejected")),
        (5, ""),
    ]
    for chosen, rejected in zip(made[0:8:2], made[1:8:2], strict=True):
        assert isinstance(chosen, Shown)
        assert isinstance(rejected, Shown)
        assert chosen.encoded == template.encode(whole[0])
        assert rejected.encoded == template.encode(whole[1])
        assert f", rejected: {len(rejected.encoded)} tokens" in rejected.title
        assert to_terminal(rejected).plain.startswith(rejected.title)
        assert json.loads(to_json(rejected))["side"] == "rejected"
        assert "bad" in json.loads(to_json(rejected))["text"]
    assert "side" not in json.loads(to_json(made[8])) if isinstance(made[8], Shown) else None
    page = to_html(made, "pairs")
    assert page.count("<section>") == 9
    assert page.count(", rejected: ") == page.count(", chosen: ") == 4


def test_a_pair_of_which_one_answer_is_refused_is_named_once(file: Path) -> None:
    asked = {"role": "user", "content": "q"}
    rejected = [asked, {"role": "assistant", "content": "b", "loss": False}]
    file.write_text(json.dumps({"messages": [asked, {"role": "assistant", "content": "a"}], "rejected_messages": rejected}) + "\n")
    made = inspect_rows(first_rows([str(file)], ReadSettings(), 1)[0], ChatTemplate(tokenizer_for("qwen2_5")))
    assert [str(one) for one in made] == [f"{file}:1: the rejected answer: no assistant turn to train on; every training row needs one"]
    assert isinstance(made[0], DataError)
