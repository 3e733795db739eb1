"""Flags, then generation_config.json, then transformers' defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mswift.config import GenerationSection
from mswift.errors import ModelError
from mswift.rollout.sampling import Sampling
from mswift.rollout.settings import GenerationSettings, resolve_settings


def resolve(folder: Path, own: Any = None, **flags: Any) -> GenerationSettings:
    if own is not None:
        (folder / "generation_config.json").write_text(json.dumps(own))
    settings, notes = resolve_settings(GenerationSection(**flags), folder, [7])
    assert notes == []
    return settings


def test_without_a_config_the_likeliest_token_is_taken(tmp_path: Path) -> None:
    settings = resolve(tmp_path)
    assert settings == GenerationSettings(Sampling(), max_new_tokens=2048, stop_token_ids=(7,))
    assert settings.sampling.is_greedy
    assert settings.describe() == "the likeliest token (temperature 0), up to 2048 tokens"


def test_a_config_that_asks_for_sampling_is_followed(tmp_path: Path) -> None:
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [9, 3]}
    settings = resolve(tmp_path, own)
    assert settings.sampling == Sampling(0.6, 20, 0.95, 1.05)
    assert settings.stop_token_ids == (3, 7, 9)
    assert settings.describe() == "temperature 0.6, top_k 20, top_p 0.95, repetition_penalty 1.05, up to 2048 tokens"


def test_flags_win(tmp_path: Path) -> None:
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 9}
    flags = {"temperature": 1.5, "top_p": 0.5, "top_k": 0, "repetition_penalty": 1.2, "max_new_tokens": 5, "stop_words": ["", "END"]}
    settings = resolve(tmp_path, own, **flags)
    assert settings == GenerationSettings(Sampling(1.5, 0, 0.5, 1.2), 5, (7, 9), ("END",))
    assert resolve(tmp_path, own, temperature=0.0).sampling == Sampling()


def test_a_temperature_draws_from_a_model_that_is_greedy_by_itself(tmp_path: Path) -> None:
    own = {"temperature": 0.2, "top_p": 0.3}
    assert resolve(tmp_path, own).sampling == Sampling()
    assert resolve(tmp_path, own, temperature=0.7).sampling == Sampling(0.7, 50, 0.3)
    assert resolve(tmp_path, {"do_sample": True}).sampling == Sampling(1.0, 50, 1.0)


def test_a_flag_without_effect_is_named(tmp_path: Path) -> None:
    _, notes = resolve_settings(GenerationSection(top_p=0.5, seed=1), tmp_path)
    assert [note.split()[0] for note in notes] == ["--top_p", "--seed"]
    assert "give --temperature" in notes[0]


@pytest.mark.parametrize("content", ["{", "[1]", b"\xff"])
def test_a_broken_config_is_one_line(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        resolve_settings(GenerationSection(), tmp_path)
    assert "generation_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
