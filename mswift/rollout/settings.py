"""What one answer is generated with: the flags, completed by the model's own generation_config.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mswift.config import GenerationSection
from mswift.config.json_object import read_json_object
from mswift.errors import ModelError
from mswift.rollout.sampling import Sampling

GENERATION_CONFIG = "generation_config.json"
DEFAULT_MAX_NEW_TOKENS = 2048
_TRANSFORMERS_TOP_K = 50
"""What transformers takes where neither a flag nor the checkpoint says how many tokens to draw from."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers are drawn, and where they end.

    Args:
        sampling: how a token is chosen. max_new_tokens: longest answer, its end token included; less where the model's length ends first.
        stop_token_ids: tokens that end an answer. stop_words: texts that do; neither is part of the answer's text.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stop_token_ids: tuple[int, ...] = ()
    stop_words: tuple[str, ...] = ()

    def describe(self) -> str:
        """One short text, such as ``temperature 0.7, top_p 0.9, up to 2048 tokens``."""
        sampling = self.sampling
        parts = ["the likeliest token (temperature 0)"] if sampling.is_greedy else [f"temperature {sampling.temperature:g}"]
        if not sampling.is_greedy:
            parts += [f"top_k {sampling.top_k}"] if sampling.top_k else []
            parts += [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        parts += [f"repetition_penalty {sampling.repetition_penalty:g}"] if sampling.repetition_penalty != 1 else []
        return ", ".join([*parts, f"up to {self.max_new_tokens} tokens"])


def resolve_settings(section: GenerationSection, directory: Path, stop_token_ids: Iterable[int] = ()) -> tuple[GenerationSettings, list[str]]:
    """The settings of a run, and a note for each flag that has no effect.

    A flag wins over the checkpoint's generation_config.json, and this over the defaults of transformers (temperature 1, top_k 50, top_p 1,
    no penalty). Without ``--temperature`` a checkpoint that does not ask for sampling (``do_sample``) is answered greedily, as transformers
    and ms-swift do. Its ``eos_token_id`` (one or several) end an answer beside `stop_token_ids`.

    Args:
        directory: the checkpoint. stop_token_ids: those of the chat template.

    Raises:
        ModelError: generation_config.json cannot be read.
    """
    own = _read_generation_config(directory)
    greedy = section.temperature == 0 or (section.temperature is None and not own.get("do_sample"))
    sampling = Sampling(
        temperature=0.0 if greedy else _first(section.temperature, own.get("temperature"), 1.0),
        top_k=0 if greedy else _first(section.top_k, own.get("top_k"), _TRANSFORMERS_TOP_K),
        top_p=1.0 if greedy else _first(section.top_p, own.get("top_p"), 1.0),
        repetition_penalty=_first(section.repetition_penalty, own.get("repetition_penalty"), 1.0),
    )
    notes = []
    if greedy and section.temperature is None:
        unused = [name for name, value in (("top_p", section.top_p), ("top_k", section.top_k), ("seed", section.seed)) if value is not None]
        notes = [f"--{name} has no effect: this model answers with the likeliest token; give --temperature to draw" for name in unused]
    eos = own.get("eos_token_id")
    ends = {*stop_token_ids, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    return (
        GenerationSettings(sampling, section.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, tuple(sorted(ends)), tuple(filter(None, section.stop_words))),
        notes,
    )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _read_generation_config(directory: Path) -> dict[str, Any]:
    path = directory / GENERATION_CONFIG
    return read_json_object(path, ModelError, "mend it or remove it") if path.is_file() else {}
