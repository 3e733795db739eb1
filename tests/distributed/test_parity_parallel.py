"""A model that is spread over processes computes what transformers computes on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.cases import CASES, MIXTURES
from tests.parity.checks import check_against_transformers

TP2, PP2, EP2 = (2, {"tp": 2}), (2, {"pp": 2}), (2, {"ep": 2})
SP2 = (2, {"tp": 2, "sequence_parallel": True})
# Mixtures train over TP with split sequences only; TP2 pads 3 groups of heads to 4
PLAIN = [(f"{family}/plain", layout) for family in CASES for layout in (SP2 if family in MIXTURES else TP2, PP2)]
SPECIAL = [
    ("llama/biases", TP2),
    ("llama/tied", TP2),
    ("llama/tied", PP2),
    ("llama/no-groups", TP2),
    ("llama/one-group", TP2),
    ("qwen2/two-groups", (4, {"tp": 4})),
    ("qwen2/windows", (4, {"tp": 2, "pp": 2})),
    ("qwen3/biases", SP2),
    ("qwen3/one-group", TP2),
    ("qwen3/tied", (2, {"pp": 2, "vpp": 2})),
    ("gemma2/plain", (4, {"tp": 2, "pp": 2})),
    ("gemma3_text/scaled", (2, {"pp": 2, "vpp": 2})),
    ("olmo2/one-group", TP2),
    ("olmo2/plain", SP2),
    ("cohere/head-norms", TP2),
    ("cohere/one-group", TP2),
    ("cohere/plain", SP2),
    ("starcoder2/plain", SP2),
    ("phi3/one-group", TP2),
    ("phi3/longrope-long", (2, {"pp": 2})),
    ("smollm3/plain", (2, {"pp": 2, "vpp": 2})),
    ("glm4/biases", SP2),
    ("qwen2_moe/normalised-some-dense", (2, {"pp": 2, "vpp": 2})),
    *((f"{family}/plain", EP2) for family in MIXTURES),
    ("mixtral/plain", (2, {"ep": 2, "tp": 2, "sequence_parallel": True})),
    ("qwen2_moe/plain", (4, {"ep": 2, "pp": 2})),
    ("qwen3_moe/plain", (4, {"ep": 2, "tp": 2, "sequence_parallel": True})),
    ("glm4_moe/plain", (4, {"ep": 2, "etp": 2, "tp": 2, "sequence_parallel": True})),
    ("qwen3_5_text/one-group", TP2),
    ("qwen3_5_text/biases", SP2),
    ("qwen3_next/not-normalised-some-dense", (2, {"pp": 2, "vpp": 2})),
    ("deepseek_v3/halves-biases", SP2),
    ("deepseek_v3/dense", TP2),
    ("llama4_text/dense", TP2),
    ("deepseek_v3/no-narrow-queries", (4, {"tp": 2, "pp": 2, "sequence_parallel": True})),
    ("gpt_oss/one-group", SP2),
    ("gpt_oss/plain", (4, {"ep": 2, "etp": 2, "tp": 2, "sequence_parallel": True})),
    ("gpt_oss/plain", (2, {"ep": 2, "tp": 2, "sequence_parallel": True})),
    ("gpt_oss/plain", (4, {"tp": 2, "pp": 2, "sequence_parallel": True})),
    ("qwen3_moe/not-normalised", (4, {"tp": 2, "pp": 2, "sequence_parallel": True})),
]


@pytest.mark.parametrize(("case", "layout"), [*PLAIN, *SPECIAL], ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part[1])))
def test_logits_loss_and_gradients_equal_those_of_transformers(case: str, layout: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    check_against_transformers(case, *layout, tmp_path)


PIPELINED = {"vpp": (2, {"pp": 2, "vpp": 2}), "tp-pp": (4, {"tp": 2, "pp": 2}), "tp-pp-sp": (4, {"tp": 2, "pp": 2, "sequence_parallel": True})}
SPREAD = (2, {"ep": 2, "tp": 2, "sequence_parallel": True})
DEEP = [
    *((f"{family}/plain", PIPELINED[name]) for family in CASES for name in ("vpp", "tp-pp-sp" if family in MIXTURES else "tp-pp")),
    *((f"{family}/plain", SPREAD) for family in MIXTURES),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"),
    [pair for pair in DEEP if pair not in SPECIAL],
    ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part[1])),
)
def test_every_family_in_deeper_layouts(case: str, layout: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    check_against_transformers(case, *layout, tmp_path)
