"""README and docs say what is there: their links lead somewhere, their commands are accepted, and both languages tell the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mswift.config import CONFIGS, parse_command

ROOT = Path(__file__).resolve().parents[3]
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
DOCUMENTS = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]


def commands(path: Path) -> list[str]:
    """Lines of code blocks, without what follows a #."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", path.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(?:[A-Z_]+=\S+ )*(?:mswift|make|pip|bash|sbatch) ", line)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:mswift|tests|docs|examples)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
    assert max(map(len, text.splitlines())) < 400


def test_commands_of_the_readme_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ours = [line for line in commands(READMES[0]) if "mswift " in line.split("pip")[0]]
    assert len(ours) >= 6
    for line in ours:
        verb, *words = line.split("mswift ", 1)[1].split()
        assert verb in CONFIGS
        needed = {"sft": ["--model", "here", "--dataset", "rows.jsonl"], "infer": ["--model", "here"], "export": ["--model", "here"]}[verb]
        file_first = [words.pop(0)] if words and words[0].endswith(".yaml") else []
        config = parse_command(verb, [*file_first, *needed, *words])  # type: ignore[call-overload]
        assert config.model.model
    for line in commands(READMES[0]):
        for name in re.findall(r"\bexamples/\S+", line):
            assert (ROOT / name).is_file(), name


def test_both_languages_tell_the_same() -> None:
    english, chinese = (path.read_text(encoding="utf8") for path in READMES)
    assert commands(READMES[0]) == commands(READMES[1])
    for pattern in (r"^## ", r"^\| ", r"^- ", r"^```"):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, chinese, re.MULTILINE)), pattern
    assert {"make demo", "make test"} <= set(commands(READMES[0]))
    assert "Apache-2.0" in english
    assert "Apache-2.0" in chinese


def test_make_knows_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    named = {match for path in DOCUMENTS for match in re.findall(r"`make ([a-z-]+)`", path.read_text(encoding="utf8"))}
    assert named >= {"demo", "test", "test-all"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    runner = ROOT / ".ci" / "run"
    assert "make test\n" in runner.read_text(encoding="utf8")
    assert runner.stat().st_mode & 0o111
