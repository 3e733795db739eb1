"""The registry, and the sizes that a layout rounds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.errors import ConfigError, ModelError
from mswift.families import families, find_family
from mswift.families.base import AttentionStyle, MegatronDescription, choose_dtype
from tests.parity.cases import CASES

ROOT = Path(__file__).parents[3]


def description(heads: int, groups: int, vocab_size: int) -> MegatronDescription:
    fields: dict[str, Any] = {"num_attention_heads": heads, "num_query_groups": groups}
    return MegatronDescription(fields, vocab_size, max_sequence_length=64, tied=False, attention=AttentionStyle((), ()))


def test_families_are_found_by_architecture() -> None:
    names = [family.name for family in families()]
    assert names == sorted(set(names))
    assert {"llama", "qwen2", "qwen3"} <= set(names)
    for family in families():
        for architecture in family.architectures:
            assert find_family(["Unheard", architecture], "here") is family


def test_an_unknown_architecture_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ModelError,
        match=r"^here: architecture Qwen3ForCausalLN is not supported; nearest supported: Qwen3ForCausalLM; take that, or another of the \d+ ",
    ) as caught:
        find_family(["Qwen3ForCausalLN"], "here")
    assert "\n" not in str(caught.value)
    for nothing in (None, [], "LlamaForCausalLM", [7]):
        with pytest.raises(ModelError, match=r"here: config.json has architectures .*, wanted a list with one, such as Starcoder2F.*; mend it"):
            find_family(nothing, "here")


def test_dtypes() -> None:
    assert choose_dtype("float32", "bfloat16", "here") == "float32"
    assert choose_dtype(None, torch.bfloat16, "here") == "bfloat16"
    assert choose_dtype(None, None, "here") == "float32"
    with pytest.raises(ConfigError, match=r"^here is in float16, wanted bfloat16 or float32; give --torch_dtype"):
        choose_dtype(None, torch.float16, "here")


@given(groups=st.integers(1, 12), per_group=st.integers(1, 8), tp=st.integers(1, 16), vocab=st.integers(1, 70000))
def test_padding_divides_and_is_the_least(groups: int, per_group: int, tp: int, vocab: int) -> None:
    given_description = description(groups * per_group, groups, vocab)
    padding = given_description.padding(tp)
    heads = padding.groups * given_description.heads_per_group
    assert heads % tp == 0
    assert padding.groups % tp == 0 or tp % padding.groups == 0
    assert groups <= padding.groups < groups + tp
    assert padding.vocab % (8 * tp) == 0
    assert 0 <= padding.vocab - vocab < 8 * tp
    if tp == 1:
        assert padding.groups == groups


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "padded"),
    [(32, 8, 8, 8), (9, 3, 2, 4), (14, 2, 4, 4), (16, 2, 8, 2), (6, 1, 2, 1), (6, 6, 4, 8), (12, 4, 3, 6)],
)
def test_padded_groups(heads: int, groups: int, tp: int, padded: int) -> None:
    sizes = description(heads, groups, 100)
    assert sizes.padding(tp).groups == padded
    assert sizes.padding(1).groups == groups
    assert sizes.heads_per_group == heads // groups


def test_the_table_of_models_is_that_of_the_registry() -> None:
    """Written anew by ``python -m tests.parity.table``."""
    lines = [line for line in (ROOT / "docs" / "models.md").read_text(encoding="utf8").splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == [family.name for family in families()]
    for row, family in zip(cells, families(), strict=True):
        assert row[1] == ", ".join(f"`{name}`" for name in (*family.architectures, *family.holders))
        assert row[2] == ", ".join(CASES[family.name])
        assert float(row[3]) < 1e-4
        assert row[6] == (family.limits or "-")
