"""Accounting: every gap is found and named; a complete model has none."""

from __future__ import annotations

import pytest

from mswift.conversion.coverage import drops_of, fail_on, gaps, rules_by_target, source_rows
from mswift.conversion.rules import Drop, FusedGateUp, PaddedRows, Rename, Rule, TiedHead
from mswift.errors import ConversionError

RULES = (
    PaddedRows("embedding", "embed", 5, 8),
    TiedHead("head", "embed", 5, 8),
    FusedGateUp("fc1", "gate", "up"),
    Drop("lm_head", "tied", equals="embed"),
)
TENSORS = {"embed", "gate", "up"}


def test_a_complete_model_has_no_gaps() -> None:
    assert gaps(RULES, ["embedding", "fc1"], TENSORS) == []
    assert gaps(RULES, ["embedding", "fc1", "head"], TENSORS | {"lm_head"}) == []
    assert list(rules_by_target(RULES)) == ["embedding", "head", "fc1"]
    assert drops_of(RULES) == [RULES[-1]]


@pytest.mark.parametrize(
    ("parameters", "tensors", "found"),
    [
        (["embedding", "fc1", "x"], TENSORS, "1 parameter (x) without a rule"),
        (["embedding"], TENSORS, "1 rule (fc1) without a parameter"),
        (["embedding", "fc1"], {"embed"}, "2 tensors (gate, up) missing from the checkpoint"),
        (["embedding", "fc1"], TENSORS | {"y", "z"}, "2 tensors (y, z) that no rule reads"),
    ],
)
def test_each_gap_is_named(parameters: list[str], tensors: set[str], found: str) -> None:
    assert gaps(RULES, parameters, tensors) == [found]
    with pytest.raises(ConversionError, match="cannot load m: ") as caught:
        fail_on([found, found], "load m")
    assert f"{found}; {found}; the config" in str(caught.value)
    fail_on([], "load m")


def test_two_rules_for_one_parameter() -> None:
    with pytest.raises(ConversionError, match="two rules fill fc1"):
        rules_by_target([*RULES, Rename("fc1", "other")])


def test_the_tensors_of_a_whole_model() -> None:
    rules: dict[str, Rule] = {"embedding": PaddedRows("embedding", "embed", 5, 8), "fc1": FusedGateUp("fc1", "gate", "up")}
    shapes = {"embedding": (8, 3), "fc1": (10, 3), "copy": (5, 3), "small": (4, 3)}
    assert source_rows(rules, shapes) == ({"embed": (5, 3), "gate": (5, 3), "up": (5, 3)}, [])
    _, problems = source_rows(rules | {"copy": Rename("copy", "up")}, shapes)
    assert problems == ["1 tensor (up) whose rows are not all there once"]
    _, problems = source_rows(rules | {"small": Rename("small", "gate")}, shapes)
    assert problems == ["1 tensor (gate) of two shapes", "1 tensor (gate) whose rows are not all there once"]
