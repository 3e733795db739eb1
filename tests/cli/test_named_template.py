"""A base model without a chat template, trained with a named one: every export serves the prompt that was trained, and stops where turns end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mswift.templates import ChatTemplate
from mswift.templates.named import find_template
from tests.cli.program import Outcome, Worker, contents
from tests.tiny import CORPUS, make_checkpoint

NAME = "qwen2_5"
"""It writes a system prompt of its own, and ends turns with a token that is not the end token of the base model here."""


@dataclass(frozen=True)
class Run:
    """A finished run. base: the model without a template. rows: what it was trained on."""

    folder: Path
    base: Path
    rows: list[list[dict[str, Any]]]
    worker: Worker

    def mswift(self, *words: str) -> Outcome:
        outcome = self.worker.run(list(words), self.folder)
        assert outcome.code == 0, outcome.err
        return outcome


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**content, **changes}.items() if value is not None}))


@pytest.fixture(scope="module")
def run(heavy: Worker, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("named")
    base = make_checkpoint(folder / "base")
    (base / "chat_template.jinja").unlink()
    edit(base / "tokenizer_config.json", eos_token="<pad>", chat_template=None)
    edit(base / "generation_config.json", eos_token_id=0)
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "I am a tiny model"}] for text in CORPUS]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    made = Run(folder, base, rows, heavy)
    flags = ["--max_steps", "40", "--learning_rate", "0.01", "--global_batch_size", "6", "--torch_dtype", "float32", "--report_to", "none"]
    quick = ["--plot", "false", "--lora_dropout", "0", "--merge_lora", "true"]
    made.mswift("sft", "--model", "base", "--dataset", "rows.jsonl", "--template", NAME, "--output_dir", "out", *flags, *quick)
    return made


def trained_prompt(run: Run, row: list[dict[str, Any]]) -> list[int]:
    """What stands before the first trained token."""
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    assert tokenizer.chat_template is None
    (encoded,) = ChatTemplate(tokenizer, chat_template=find_template(NAME).text).encode_rows(row)
    return encoded.input_ids[: next(i for i, weight in enumerate(encoded.weights) if weight)]


@pytest.mark.parametrize("place", ["out/checkpoint-40", "out/merged"])
def test_what_a_run_leaves_serves_the_prompt_that_was_trained(run: Run, place: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.folder / place)
    for row in run.rows:
        served = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert served == trained_prompt(run, row)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<pad>")
    assert GenerationConfig.from_pretrained(run.folder / place).eos_token_id == [1, 0]
    assert json.loads((run.folder / place / "tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template
    assert json.loads((run.folder / place / "args.json").read_text())["template"] == NAME


def test_transformers_stops_at_the_end_of_a_turn(run: Run) -> None:
    place = run.folder / "out" / "merged"
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place)
    for row in run.rows[:2]:
        prompt = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        assert tokenizer.decode(written) == "I am a tiny model<|im_end|>"


@pytest.mark.parametrize("flags", [("--adapters", "out"), ("--model", "out/merged")])
def test_infer_takes_the_template_up_again_and_says_what_it_recognised(run: Run, flags: tuple[str, str]) -> None:
    result = f"answers-{flags[0][2:]}.jsonl"
    rows = ["--val_dataset", "rows.jsonl", "--result_path", result, "--max_new_tokens", "30", "--temperature", "0"]
    outcome = run.mswift("infer", *flags, *rows)
    answers = [json.loads(line) for line in (run.folder / result).read_text().splitlines()]
    assert [answer["response"] for answer in answers] == ["I am a tiny model"] * len(run.rows)
    assert "rows.jsonl: 6 rows of messages\n" in outcome.err
    assert f"template {NAME}" in outcome.err


def test_an_export_says_the_same_as_the_run(run: Run) -> None:
    run.mswift("export", "--adapters", "out", "--merge_lora", "true", "--output_dir", "exported")
    merged, exported = contents(run.folder / "out" / "merged"), contents(run.folder / "exported")
    small = {"chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "generation_config.json"}
    assert {name: exported[name] for name in small} == {name: merged[name] for name in small}
    assert json.loads(exported["args.json"])["template"] == NAME
    run.mswift("export", "--model", "exported", "--to_mcore", "true", "--output_dir", "mcore")
    megatron = contents(run.folder / "mcore")
    assert {name: megatron[name] for name in small} == {name: merged[name] for name in small}
    assert json.loads(megatron["args.json"])["template"] == NAME
    run.mswift("export", "--model", "base", "--template", NAME, "--output_dir", "named")
    assert {name: contents(run.folder / "named")[name] for name in small} == {name: merged[name] for name in small}


def test_an_adapter_that_knows_no_args_brings_its_template_along(run: Run) -> None:
    shutil.copytree(run.folder / "out" / "checkpoint-40", run.folder / "alone")
    (run.folder / "alone" / "args.json").unlink()
    rows = ["--val_dataset", "rows.jsonl", "--result_path", "alone.jsonl", "--max_new_tokens", "30", "--temperature", "0"]
    run.mswift("infer", "--model", "base", "--adapters", "alone", *rows)
    answers = [json.loads(line)["response"] for line in (run.folder / "alone.jsonl").read_text().splitlines()]
    assert answers == ["I am a tiny model"] * len(run.rows)
    run.mswift("export", "--model", "base", "--adapters", "alone", "--merge_lora", "true", "--output_dir", "merged-alone")
    assert (run.folder / "merged-alone" / "chat_template.jinja").read_text() == find_template(NAME).text
    assert GenerationConfig.from_pretrained(run.folder / "merged-alone").eos_token_id == [1, 0]
