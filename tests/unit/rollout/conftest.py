"""Tiny checkpoints, loaded by us and by transformers, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("generate") / "llama")


@pytest.fixture(scope="session")
def load(world_of_one: None) -> Callable[..., Any]:
    """``load(directory, adapter=None, dtype="float32")``: a MegatronModel in a world of one."""
    from mswift.engines.megatron_model import BuildSettings, MegatronModel
    from mswift.parallel.groups import make_groups
    from mswift.parallel.layout import ParallelLayout
    from mswift.runtime.device import select

    runtime = select("cpu")
    groups = make_groups(ParallelLayout())

    def load_model(directory: Path, adapter: Path | None = None, dtype: str = "float32") -> MegatronModel:
        model = MegatronModel(BuildSettings(directory, dtype=dtype), groups, runtime)
        if adapter is not None:
            model.load_adapter(adapter)
        return model

    return load_model


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def generator(load: Callable[..., Any], checkpoint: Path, tokenizer: Any) -> Any:
    from mswift.rollout.generate import Generator

    return Generator(load(checkpoint), tokenizer)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Three prompts of unequal length."""
    ids = torch.randint(3, 331, (3, 17), generator=torch.Generator().manual_seed(5)).tolist()
    return [ids[0][:9], ids[1], ids[2][:4]]


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> Any:
    from mswift.rollout.prompts import PromptEncoder
    from mswift.templates.chat import ChatTemplate

    return PromptEncoder(ChatTemplate(tokenizer))
