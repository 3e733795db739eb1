"""What a run trains on, from the command line: mixtures, streams that go on where they stopped, plain text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Lab
from tests.cli.program import Worker, assert_one_line
from tests.tiny import CORPUS

Words = list[str]


def write(path: Path, begin: int, end: int) -> str:
    rows = [{"question": f"{CORPUS[i % 6]} {i}", "answer": CORPUS[(i + 1) % 6]} for i in range(begin, end)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def run(heavy: Worker, lab: Lab, *flags: str, verb: str = "sft", output: str = "out") -> str:
    words = lab.sft(output=output)
    words = [verb, *words[1 : words.index("--dataset")], *words[words.index("--dataset") + 2 :], *flags, "--logging_steps", "1"]
    done = heavy.run(words, lab.folder)
    assert done.code == 0, done.err
    return done.err


def test_a_mixture_is_said_before_the_start(heavy: Worker, lab: Lab) -> None:
    a, b = write(lab.folder / "a.jsonl", 0, 30), write(lab.folder / "b.jsonl", 30, 40)
    said = run(heavy, lab, "--dataset", f"{a}@3", f"{b}@1")
    assert f"{a}: 30 rows of query/response; question read as query, answer read as response" in said
    table = [line.split() for line in said.splitlines() if line.startswith((f"{a}@3", f"{b}@1", "source ", "all "))]
    assert [row[1:-2] for row in table[1:]] == [["30", "30"], ["10", "10"], ["40", "40"]]
    assert table[0] == ["source", "rows", "in", "an", "epoch", "tokens", "share"]
    said = run(heavy, lab, "--dataset", a, f"{b}#25", "--interleave_prob", "0.5", "0.5", "--stopping_strategy", "all_exhausted", output="two")
    table = [line.split() for line in said.splitlines() if line.startswith((a, b)) and line.endswith("%")]
    assert [row[1:3] for row in table] == [["30", "30"], ["10", "30"]]


def test_a_mixture_that_starves_a_source_is_an_error(heavy: Worker, lab: Lab) -> None:
    a, b = write(lab.folder / "a.jsonl", 0, 30), write(lab.folder / "b.jsonl", 30, 40)
    words = lab.sft()
    at = words.index("rows.jsonl")
    done = heavy.run([*words[:at], f"{a}@999", f"{b}@1", *words[at + 1 :]], lab.folder)
    line = assert_one_line(done, "gives entry 2 of --dataset no row in an epoch of 30", "raise it, or take --stopping_strategy all_exhausted")
    assert "0.10%" in line


def test_a_stream_goes_on_where_it_stopped(heavy: Worker, lab: Lab) -> None:
    (lab.folder / "data").mkdir()
    for name, begin, end in (("a.jsonl", 0, 21), ("b.jsonl", 21, 40)):
        write(lab.folder / "data" / name, begin, end)
    flags = ("--dataset", "data", "--streaming", "true", "--shuffle_buffer_size", "8", "--lr_scheduler_type", "constant", "--max_steps", "12")
    said = run(heavy, lab, *flags)
    assert "data: streamed, 40 rows in 2 files, 40 in an epoch (100.0%)" in said
    whole = losses(lab.folder / "out")
    assert len(set(whole)) == len(whole) == 12
    taken = json.loads((lab.folder / "out" / "checkpoint-12" / "resume" / "resume.json").read_text())["rows_taken"]
    assert taken == {"1: data": 48}
    stopped = [*flags[:-1], "4", "--save_steps", "2"]
    run(heavy, lab, *stopped, output="again")
    run(heavy, lab, *flags, "--resume_from_checkpoint", "auto", "--dataloader_num_workers", "2", output="again")
    assert losses(lab.folder / "again")[-8:] == whole[-8:], "two processes read the rest"


def test_plain_text_is_trained_whole(heavy: Worker, lab: Lab) -> None:
    (lab.folder / "text.txt").write_text("\n".join(CORPUS * 4))
    said = run(heavy, lab, "--dataset", "text.txt", "--truncation_strategy", "split", "--max_length", "16", "--packing", "true", verb="pt")
    assert "text.txt: 24 rows of text; text read as response" in said
    assert len(losses(lab.folder / "out")) == 4
    assert json.loads((lab.folder / "out" / "args.json").read_text())["dataset"] == ["text.txt"]


@pytest.mark.slow
def test_a_stream_of_two_processes_goes_on_in_one(heavy: Worker, lab: Lab) -> None:
    write(lab.folder / "a.jsonl", 0, 40)
    flags = ("--dataset", "a.jsonl", "--streaming", "true", "--lr_scheduler_type", "constant", "--max_steps", "12", "--lora_dropout", "0")
    run(heavy, lab, *flags)
    words = lab.sft(output="two")
    words = ["sft", *words[1 : words.index("--dataset")], *words[words.index("--dataset") + 2 :], *flags, "--logging_steps", "1", "--max_steps", "4"]
    done = heavy.run(words, lab.folder, NPROC_PER_NODE="2")
    assert done.code == 0, done.err
    run(heavy, lab, *flags, "--resume_from_checkpoint", "auto", output="two")
    assert losses(lab.folder / "two") == pytest.approx(losses(lab.folder / "out"), rel=1e-5)
