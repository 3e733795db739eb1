"""``mswift export --to_cached_dataset``, then ``mswift sft --cached_dataset``: the run is the one that tokenises by itself; with packs too."""

from __future__ import annotations

import json
from pathlib import Path

from mswift.data.batches import Batches
from mswift.data.packing import PackIndex
from mswift.data.pairs import load_pairs
from tests.cli.conftest import Lab
from tests.cli.program import Worker, assert_one_line, contents

CACHE = ["export", "--model", "m", "--dataset", "rows.jsonl", "--to_cached_dataset", "true", "--output_dir", "cached"]


def losses(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def cached(words: list[str]) -> list[str]:
    """The same run from tokens."""
    at = words.index("--dataset")
    return [*words[:at], "--cached_dataset", "cached", *words[at + 2 :]]


def test_a_run_from_tokens_is_the_run_from_rows(heavy: Worker, lab: Lab) -> None:
    lab.copy("m")
    lab.copy("rows.jsonl")
    made = heavy.run([*CACHE, "--dataset_num_proc", "2", "--split_dataset_ratio", "0.2"], lab.folder)
    assert made.code == 0, made.err
    assert made.out.splitlines()[-1] == "train on it: mswift sft --model m --cached_dataset cached"
    assert "19 rows" in made.err
    assert {path.name for path in (lab.folder / "cached").iterdir()} == {"train", "val"}
    pack = ["--packing", "true", "--packing_length", "256", "--logging_steps", "1"]
    for flags in (["--logging_steps", "1"], pack):
        folders = []
        for name, words in (
            ("rows", lab.sft("--split_dataset_ratio", "0.2", *flags)),
            ("tokens", cached(lab.sft("--cached_val_dataset", "cached", *flags))),
        ):
            words[words.index("--output_dir") + 1] = folder = f"{name}-{len(flags)}"
            done = heavy.run(words, lab.folder)
            assert done.code == 0, done.err
            folders.append(lab.folder / folder)
            assert ("packing: 19 rows in" in done.err) == (flags is pack)
            assert (lab.folder / folder / "checkpoint-4").is_dir()
        first, second = map(losses, folders)
        assert first == second
        assert len(first) == 4
    packs = [path.name for path in (lab.folder / "cached" / "train").iterdir() if path.name.startswith("packing-")]
    assert len(packs) >= 2, "the packs of each epoch that was begun are saved"
    again = heavy.run(
        cached(lab.sft("--packing", "true", "--packing_length", "128", "--resume_from_checkpoint", str(folders[1] / "checkpoint-2"))), lab.folder
    )
    assert "the data, global_batch_size or seed changed since" in again.err, "another length of packs is another order of rows"


def test_tokens_of_something_else_are_refused(light: Worker, heavy: Worker, lab: Lab) -> None:
    lab.copy("m")
    lab.copy("rows.jsonl")
    assert heavy.run(CACHE, lab.folder).code == 0
    before = contents(lab.folder)
    message = "cached/train was made with another setting of the template (system, loss_scale, enable_thinking) than this run has"
    assert_one_line(heavy.run(cached(lab.sft("--system", "Be kind.")), lab.folder), message)
    assert_one_line(
        light.run([*cached(lab.sft())[:3], "--cached_dataset", "nothing", "--output_dir", "out"], lab.folder), "nothing is no cached data set"
    )
    assert_one_line(light.run(CACHE, lab.folder), "--output_dir cached exists already")
    assert contents(lab.folder) == before
    assert heavy.run([*CACHE, "--exist_ok", "true"], lab.folder).code == 0
    assert {path.name for path in (lab.folder / "cached").iterdir()} == {"train"}


def test_preference_rows_become_pairs_that_stay_together(light: Worker, heavy: Worker, lab: Lab) -> None:
    lab.copy("m")
    rows = [{"prompt": f"question {i}", "chosen": "good " * (1 + i % 5), "rejected": "bad " * (1 + i % 3)} for i in range(20)]
    (lab.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*CACHE, "--template_mode", "rlhf"]
    made = heavy.run([*words, "--split_dataset_ratio", "0.2"], lab.folder)
    assert made.code == 0, made.err
    assert "16 preference rows, " in made.err
    assert made.out == "preference rows, of which both answers stay together, are in cached\n"
    pairs, held_out = (load_pairs([str(lab.folder / "cached")], part=part) for part in ("train", "val"))
    assert (len(pairs), len(held_out)) == (16, 4)
    packs = PackIndex(pairs.data.lengths, 256, groups=pairs.groups)
    batches = Batches(pairs.data, micro_batch_size=1, global_batch_size=2, packs=packs, groups=pairs.groups)
    seen = [batch.rows for k in range(batches.steps_per_epoch) for batch in batches.step(k)]
    assert sorted(row for members in seen for row in members) == list(range(32))
    assert max(map(len, seen)) > 2
    for members in seen:
        assert [row + 1 for row in members[::2]] == members[1::2]
    assert_one_line(light.run(cached(lab.sft()), lab.folder), "cached/train holds preference rows, wanted rows of one answer")
    lab.copy("rows.jsonl").write_text('{"query": "q", "response": "a"}\n')
    alone = heavy.run([*words, "--exist_ok", "true"], lab.folder)
    assert_one_line(alone, "rows.jsonl:1: the rejected answer is missing, wanted rejected, rejected_response or rejected_messages")


def test_flags_that_do_not_go_together(light: Worker, lab: Lab) -> None:
    lab.copy("m")
    wrong = {
        "--to_cached_dataset needs --output_dir": CACHE[:-2],
        "--to_cached_dataset needs --dataset": [*CACHE[:3], *CACHE[5:]],
        "--to_cached_dataset writes data, no model": [*CACHE, "--to_mcore", "true"],
        "--template_mode rlhf does not go with --truncation_strategy split": [*CACHE, "--template_mode", "rlhf", "--truncation_strategy", "split"],
        "--template_mode: kto is not supported yet": [*CACHE, "--template_mode", "kto"],
        "--packing does not go with --context_parallel_size 2 yet": lab.sft("--packing", "true", "--context_parallel_size", "2"),
        "--packing_length 10 is less than --max_length 20": lab.sft("--packing", "true", "--packing_length", "10", "--max_length", "20"),
    }
    for message, words in wrong.items():
        assert_one_line(light.run(words, lab.folder), message)
    assert len(wrong) == 7
