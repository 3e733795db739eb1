"""What the tests of errors share: a tiny model, a finished run, and two workers, one of which must never import torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.program import Worker
from tests.tiny import make_checkpoint, write_rows


@dataclass(frozen=True)
class Lab:
    """A folder in which a test may spoil everything. base: the folder with the originals ``m`` (model), ``rows.jsonl`` and ``run``."""

    folder: Path
    base: Path

    @property
    def model(self) -> Path:
        """The path of the model, copied on first use."""
        return self.copy("m")

    def copy(self, name: str) -> Path:
        source, target = self.base / name, self.folder / name
        if not target.exists():
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target

    def config(self, **changes: object) -> None:
        """Change entries of the model's config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def rows(self, *lines: str, copies: int = 1) -> None:
        """``rows.jsonl`` with `copies` of the good rows, and `lines` behind them."""
        good = (self.base / "rows.jsonl").read_text()
        (self.folder / "rows.jsonl").write_text(good * copies + "".join(f"{line}\n" for line in lines))

    def sft(self, *flags: str, model: str = "m", dataset: str = "rows.jsonl", output: str = "out") -> list[str]:
        """A short training run; what it needs is copied if it is not there."""
        for name in {model, dataset} & {"m", "rows.jsonl"}:
            self.copy(name)
        size = ["--max_steps", "4", "--save_steps", "2", "--global_batch_size", "4", "--torch_dtype", "float32", "--plot", "false"]
        return ["sft", "--model", model, "--dataset", dataset, "--output_dir", output, *size, "--report_to", "none", *flags]

    def export(self, *flags: str, model: str = "m", adapter: str = "run/checkpoint-4") -> list[str]:
        """A merge into ``exported``."""
        for name in {model, adapter.split("/")[0]} & {"m", "run"}:
            self.copy(name)
        return ["export", "--model", model, "--adapters", adapter, "--merge_lora", "true", "--output_dir", "exported", "--load_args", "false", *flags]


@pytest.fixture(scope="session")
def light() -> Iterator[Worker]:
    """For what is known before torch is imported."""
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def heavy() -> Iterator[Worker]:
    """For what is not."""
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def originals(heavy: Worker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``m``, ``rows.jsonl``, and ``run`` with its checkpoints 2 and 4. Not to be changed."""
    folder = tmp_path_factory.mktemp("errors")
    make_checkpoint(folder / "m")
    write_rows(folder / "rows.jsonl")
    done = heavy.run(Lab(folder, folder).sft(output="run"), folder)
    assert done.code == 0, done.err
    assert {path.name for path in (folder / "run").iterdir()} == {"args.json", "checkpoint-2", "checkpoint-4", "logging.jsonl"}
    return folder


@pytest.fixture
def lab(originals: Path, tmp_path: Path) -> Lab:
    return Lab(tmp_path, originals)
