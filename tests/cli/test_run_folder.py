"""What the commands make of the folder of a finished run."""

from __future__ import annotations

from tests.cli.conftest import Lab
from tests.cli.program import Worker, contents


def test_export_takes_the_newest_checkpoint(lab: Lab, heavy: Worker) -> None:
    folders = []
    for adapter in ("run", "run/checkpoint-4", "run/checkpoint-2"):
        outcome = heavy.run(lab.export(adapter=adapter), lab.folder)
        assert outcome.code == 0, outcome.err
        folders.append((lab.folder / "exported").rename(lab.folder / f"exported-{len(folders)}"))
    newest, same, other = (contents(folder) for folder in folders)
    assert newest == same
    assert newest != other, "the two checkpoints differ, so that it shows which one was taken"


def test_going_on_with_a_finished_run_says_so(lab: Lab, heavy: Worker) -> None:
    before = contents(lab.copy("run") / "checkpoint-4")
    outcome = heavy.run(lab.sft("--resume_from_checkpoint", "auto", output="run"), lab.folder)
    assert outcome.code == 0, outcome.err
    assert "nothing to train: checkpoint-4 has all 4 steps; more come with a larger --max_steps" in outcome.err
    assert contents(lab.folder / "run" / "checkpoint-4") == before
