"""The data set of the demo: enough rows of every kind, well formed, and held-out questions that are really held out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mswift.data import load_dataset

DATA = Path(__file__).resolve().parents[3] / "examples" / "data"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf8").splitlines()]


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_chat_rows_are_many_and_of_every_kind() -> None:
    chat = rows("mswift_chat.jsonl")
    assert len(chat) >= 300
    roles = [[message["role"] for message in row["messages"]] for row in chat]
    for order in roles:
        start = 1 if order[0] == "system" else 0
        assert order[start:] == ["user", "assistant"] * ((len(order) - start) // 2)
    assert sum(order[0] == "system" for order in roles) >= 20
    assert sum(order.count("assistant") > 1 for order in roles) >= 20
    texts = ["".join(message["content"] for message in row["messages"]) for row in chat]
    assert sum(re.search("[\u4e00-\u9fff]", text) is not None for text in texts) >= 20
    assert sum("Martlet" in text for text in texts) >= 50


def test_rows_load_with_mswift() -> None:
    loaded = load_dataset([str(DATA / "mswift_chat.jsonl"), str(DATA / "mswift_alpaca.jsonl")], shuffle=False, seed=0, strict=True)
    assert len(loaded) == len(rows("mswift_chat.jsonl")) + len(rows("mswift_alpaca.jsonl"))


def test_held_out_questions_are_in_no_training_row() -> None:
    asked = {words(message["content"]) for row in rows("mswift_chat.jsonl") for message in row["messages"] if message["role"] == "user"}
    asked |= {words(f"{row['instruction']} {row['input']}") for row in rows("mswift_alpaca.jsonl")}
    held_out = rows("heldout.jsonl")
    assert len(held_out) == 5
    for row in held_out:
        question = row["messages"][-1]["content"]
        assert words(question) not in asked
        assert any(keyword in row["answer"].lower() for keyword in row["keywords"]), question
        assert not any(keyword in question.lower() for keyword in row["keywords"]), "an echo of the question must not count"
        assert all(keyword == keyword.lower() for keyword in row["keywords"])
