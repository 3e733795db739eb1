"""Rows in, lines out: in order, whole, with what the row brought along."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.rows import Row
from mswift.errors import DataError
from mswift.rollout.answers import Answers, Replica, ResultFile, answer_rows
from mswift.rollout.generate import Answer, Generator
from mswift.rollout.prompts import PromptEncoder, Question, make_questions
from mswift.rollout.sampling import Sampling
from mswift.rollout.settings import GenerationSettings

SHORT = GenerationSettings(max_new_tokens=5)
WORDS = ("who are you", "tell me more about birds and models", "it is four", "what is two plus two, of course", "I am")


def row(*contents: str, line: int = 1, first: str = "user", **columns: Any) -> Row:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"] if first == "system" else ["assistant"]
    return Row([{"role": role, "content": content} for role, content in zip(roles * 5, contents)], columns, "rows.jsonl", line)


@pytest.fixture
def questions(encoder: PromptEncoder) -> list[Question]:
    rows = [row(WORDS[i % 5], f"label {i}", line=i + 1, id=i) for i in range(11)]
    return make_questions(rows, encoder, max_length=256)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def test_the_last_assistant_turn_is_the_label_and_is_not_shown(encoder: PromptEncoder) -> None:
    labelled, bare = make_questions([row("who", "me", "and", "you", id=7), row("who", line=2)], encoder, max_length=256)
    assert (labelled.label, labelled.columns) == ("you", {"id": 7})
    assert [message["content"] for message in labelled.messages] == ["who", "me", "and"]
    assert labelled.prompt == encoder.encode(labelled.messages)
    assert (bare.label, bare.prompt) == (None, encoder.encode([{"role": "user", "content": "who"}]))


def test_rows_that_cannot_be_answered_name_their_line(encoder: PromptEncoder) -> None:
    with pytest.raises(DataError, match=r"^rows.jsonl:1: .*assistant turn only"):
        make_questions([row("an answer", first="assistant")], encoder, max_length=256)
    long = row("a bird " * 30, line=9)
    with pytest.raises(DataError, match=r"^rows.jsonl:9: the prompt has \d+ tokens and the longest sequence is 20; .*--truncation_strategy left"):
        make_questions([row("who"), long], encoder, max_length=20)
    (cut,) = make_questions([long], encoder, max_length=20, cut_to=12)
    assert cut.prompt == encoder.encode(long.messages)[-12:]


def test_rows_are_answered_in_order_and_keep_their_columns(generator: Generator, questions: list[Question], tmp_path: Path) -> None:
    result = ResultFile(tmp_path / "new" / "out.jsonl")
    done = answer_rows(generator, questions, SHORT, result)
    result.close()
    lines = lines_of(result.path)
    answers = [generator.generate([question.prompt], SHORT)[0] for question in questions]
    assert [line["id"] for line in lines] == list(range(11))
    assert [line["response"] for line in lines] == [answer.text for answer in answers]
    assert list(lines[3]) == ["id", "messages", "response", "labels", "finish_reason"]
    assert lines[3]["messages"] == [*questions[3].messages, {"role": "assistant", "content": answers[3].text}]
    assert (lines[3]["labels"], lines[3]["finish_reason"]) == ("label 3", "length")
    assert done.num_tokens == 55
    assert done.tokens_per_second == pytest.approx(55 / done.seconds)


@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (1, 2), (3, 2), (2, 7)])
def test_batches_and_replicas_do_not_change_the_file(
    generator: Generator, questions: list[Question], tmp_path: Path, batch_size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mswift.rollout.answers._BATCHES_OF_A_WINDOW", 1)
    hot = replace(SHORT, sampling=Sampling(temperature=1.5))
    alone = ResultFile(tmp_path / "alone.jsonl")
    answer_rows(generator, questions, hot, alone, seed=5, prefix="P ")
    together = ResultFile(tmp_path / "together.jsonl")
    shares: list[list[Answers]] = [[] for _ in range(count)]  # of each replica, window by window
    for index in reversed(range(count)):  # the writing one last: the answers of the others are then known

        def gather(answers: Answers, index: int = index) -> list[Answers] | None:
            shares[index].append(answers)
            return None if index else [share[len(shares[0]) - 1] for share in shares]

        writing = together if index == 0 else None
        done = answer_rows(generator, questions, hot, writing, batch_size=batch_size, seed=5, prefix="P ", replica=Replica(index, count, gather))
    assert together.path.read_bytes() == alone.path.read_bytes()
    assert all(line["response"].startswith("P ") for line in lines_of(alone.path))
    assert done.num_tokens == 55
    assert len(shares[0]) > 1 or count == 7


def test_progress_reaches_the_end(generator: Generator, questions: list[Question]) -> None:
    seen: list[tuple[int, int]] = []
    answer_rows(generator, questions, SHORT, None, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (11, 11)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@given(order=st.permutations(range(6)))
def test_lines_appear_in_order_as_soon_as_they_can(order: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    result = ResultFile(tmp_path_factory.mktemp("order") / "out.jsonl")
    for count, index in enumerate(order, start=1):
        result.put(index, {"n": index, "text": "早\n"})
        given_out = set(order[:count])
        ready = next(n for n in range(7) if n not in given_out)
        assert lines_of(result.path) == [{"n": n, "text": "早\n"} for n in range(ready)]
    result.close()
    assert result.num_lines == 6


def test_without_an_answer_there_is_no_file(tmp_path: Path) -> None:
    result = ResultFile(tmp_path / "out.jsonl")
    result.put(1, {"n": 1})
    result.close()
    assert list(tmp_path.iterdir()) == []
    assert result.num_lines == 0


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    with pytest.raises(DataError, match=r"out.jsonl cannot be written: File exists; give another --result_path"):
        ResultFile(path)
    assert path.read_text() == "mine"
    with pytest.raises(DataError, match=r"below.jsonl cannot be written"):
        ResultFile(path / "below.jsonl")


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ResultFile(tmp_path / "out.jsonl")
    result.put(0, {"n": 0})
    real, room = os.write, [4]

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part, room[0] = data[: room[0]], 0
        return real(file, part)

    monkeypatch.setattr("os.write", write)
    with pytest.raises(DataError, match="No space left on device after 1 whole lines"):
        result.put(1, {"n": 1})
    assert lines_of(result.path) == [{"n": 0}]


def test_what_was_answered_before_an_interrupt_is_in_the_file(questions: list[Question], generator: Generator, tmp_path: Path) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    result = ResultFile(tmp_path / "out.jsonl")
    with pytest.raises(KeyboardInterrupt):
        answer_rows(generator, questions, SHORT, result, progress=interrupt)
    assert [line["id"] for line in lines_of(result.path)] == [0, 1, 2, 3]
    assert isinstance(generator.generate([questions[0].prompt], SHORT)[0], Answer)
