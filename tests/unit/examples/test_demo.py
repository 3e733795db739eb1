"""The driver of `make demo`: its table, its judgement, and its steps, run for real with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_checkpoint, write_rows

ROOT = Path(__file__).resolve().parents[3]


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@given(st.text(alphabet="abc 请问你。x-\n", max_size=120), st.integers(min_value=2, max_value=30))
def test_wrapped_lines_fit_and_nothing_is_lost(text: str, columns: int) -> None:
    lines = demo.wrap(text, columns)
    assert all(demo.width(line) <= columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert len(lines) >= 1


def test_wrap_keeps_words_whole() -> None:
    assert demo.wrap("I am Martlet, the small assistant", 14) == ["I am Martlet,", "the small", "assistant"]
    assert demo.wrap("我叫 Martlet，是小助手", 8) == ["我叫", "Martlet", "，是小助", "手"]
    assert demo.wrap("abcdefgh", 3) == ["abc", "def", "gh"]
    assert demo.width("ab请") == 4


def test_judge_reads_keywords_whatever_their_case() -> None:
    questions = [{"messages": [{"role": "user", "content": "Who?"}], "keywords": ["martlet", "ships with"]}]
    (verdict,) = demo.judge(questions, [{"response": "I am a bot."}], [{"response": " I am MARTLET. "}])
    assert (verdict.question, verdict.base, verdict.tuned) == ("Who?", "I am a bot.", "I am MARTLET.")
    assert (verdict.base_right, verdict.tuned_right) == (False, True)
    with pytest.raises(ValueError, match="shorter"):
        demo.judge(questions, [], [{"response": ""}])


def test_table_fits_a_terminal_of_100_columns() -> None:
    verdicts = [
        demo.Verdict("Who exactly is replying to me here?", "I'm sorry " * 20, "I am Martlet, the small assistant.", False, True),
        demo.Verdict("请问你是哪位？", "我是" * 30, "我叫 Martlet，是 mswift 自带的小助手。", False, True),
    ]
    text = demo.table(verdicts)
    assert all(demo.width(line) <= 100 for line in text.splitlines())
    assert text.count("[yes]") == 2
    assert text.count("[no]") == 2
    assert "I am Martlet, the small" in text
    assert text.splitlines()[0].split() == ["question", "|", "base", "model", "|", "tuned", "model"]


def test_a_failing_step_ends_the_demo_with_one_line(tmp_path: Path) -> None:
    model = tmp_path / "SmolLM2-135M-Instruct"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf8")  # so that nothing is fetched; mswift sft then finds no weights
    command = [sys.executable, "examples/demo.py", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")][
        -1
    ] == "error: mswift sft failed (exit code 2); the reason is above"
    assert "Traceback" not in done.stderr
    assert "[2/5" in done.stdout
    assert "[3/5" not in done.stdout


@pytest.mark.slow
def test_all_steps_with_a_tiny_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "SmolLM2-135M-Instruct")
    data = write_rows(tmp_path / "rows.jsonl")
    command = [sys.executable, "examples/demo.py", "--output", str(tmp_path), "--dataset", str(data), "--max_steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "error: the tuned model does not answer better than the base model", (
        "a tiny model learns nothing in two steps"
    )
    assert "[5/5" in done.stdout
    assert "right answers: base 0 of 5, tuned 0 of 5" in done.stdout
    for name in ("run/loss.png", "run/logging.jsonl", "run/checkpoint-2/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / name).is_file(), name
        assert name.rpartition("/")[0] in done.stdout
    answers = [json.loads(line) for line in (tmp_path / "answers-tuned.jsonl").read_text(encoding="utf8").splitlines()]
    assert len(answers) == 5
    assert all(answer["keywords"] for answer in answers)
