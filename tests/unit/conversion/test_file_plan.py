"""The plan of an export: sizes kept, work dealt out, the same for one rank and for thousands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.conversion.export_plan import plan_export
from mswift.conversion.file_plan import OutFile, index_of, plan_files, split_by_size
from mswift.conversion.rules import FusedGateUp, PaddedRows, Rename, TiedHead
from mswift.conversion.safetensors_io import TensorSpec
from mswift.conversion.staging import parse_size
from mswift.errors import ConversionError


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(torch.int8, shape)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_files_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    specs = {str(index): spec(size) for index, size in enumerate(sizes)}
    groups = split_by_size(specs, limit)
    assert [name for group in groups for name in group] == list(specs)
    assert all(group for group in groups)
    assert all(len(group) == 1 or sum(s.nbytes for s in group.values()) <= limit for group in groups)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 4))
def test_files_go_round_the_ranks(tensors_of_stage: list[int], num_replicas: int, tp_size: int) -> None:
    stages = [{f"{stage}.{index}": spec(10) for index in range(count)} for stage, count in enumerate(tensors_of_stage)]
    files = plan_files(stages, 10, [(num_replicas, tp_size)] * len(stages))
    assert len({file.name for file in files}) == len(files) == sum(tensors_of_stage)
    for stage, count in enumerate(tensors_of_stage):
        own = [(file.replica, file.shard) for file in files if file.place == stage]
        assert len(set(own)) == min(count, num_replicas * tp_size)  # nobody writes two before everybody has one
        assert {name for file in files if file.place == stage for name in file.specs} == set(stages[stage])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 5))
def test_replicas_share_what_is_worth_it(sizes: list[int], num_replicas: int) -> None:
    specs = {str(index): spec(size, 10**7) for index, size in enumerate(sizes)}
    whole, largest = sum(sizes) * 10**7, max(sizes) * 10**7
    files = plan_files([specs], 10**12, [(num_replicas, 1)])
    if whole < num_replicas * 256 * 10**6:
        assert len(files) == 1
    else:
        assert len(files) <= num_replicas
        assert max(file.nbytes for file in files) <= whole / num_replicas + largest + 1
    assert [name for file in files for name in file.specs] == list(specs)


def test_one_file_has_the_plain_name() -> None:
    assert plan_files([{"a": spec(3)}], 100) == [OutFile("model.safetensors", 0, 0, 0, {"a": spec(3)})]
    files = plan_files([{"a": spec(3)}, {"b": spec(4)}], 100)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index_of(files) == {"metadata": {"total_size": 7}, "weight_map": {"a": files[0].name, "b": files[1].name}}


def test_a_model_in_stages() -> None:
    rules = [
        PaddedRows("embedding", "embed", 5, 8),
        FusedGateUp("fc1", "gate", "up"),
        TiedHead("head", "embed", 5, 8),
        Rename("norm", "model.norm"),
    ]
    stages = [{"embedding": spec(8, 2), "fc1": spec(6, 2)}, {"norm": spec(2), "head": spec(8, 2)}]
    plan = plan_export(stages, rules, max_bytes=10, sizes=[(2, 2)] * 2)
    assert [list(file.specs) for file in plan.files] == [["embed"], ["gate"], ["up"], ["model.norm"]]
    assert plan.files[0].specs["embed"].shape == (5, 2)
    assert plan.writers_of(0, 0) == {"embed": 0, "up": 1}
    assert plan.writers_of(0, 1) == {"gate": 0}
    assert plan.writers_of(1, 0) == {"model.norm": 0}
    assert [sorted(held) for held in plan.rules] == [["embedding", "fc1"], ["norm"]]
    assert (plan.nbytes, plan.num_tensors) == (10 + 6 + 6 + 2, 4)


def test_a_parameter_that_two_stages_hold_is_written_by_the_first() -> None:
    plan = plan_export([{"a": spec(4)}, {"b": spec(4), "a": spec(4)}], [Rename("a", "x"), Rename("b", "y")])
    assert [(file.place, list(file.specs)) for file in plan.files] == [(0, ["x"]), (1, ["y"])]


def test_a_tensor_of_two_places_has_one_file_that_both_write() -> None:
    class Half(Rename):
        """Rows 0 to 2 or 2 to 4 of a tensor of 4 rows."""

        def source_shapes(self, target_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
            return {self.source: (4,)}

        def pieces(self, source_shapes: object) -> tuple:  # type: ignore[type-arg]
            from mswift.conversion.rules import Piece

            return (Piece(self.source, 0, 2) if self.target == "a" else Piece(self.source, 2, 4),)

    rules = [Half("a", "x"), Half("b", "x")]
    assert plan_export([{"a": spec(2), "b": spec(2)}], rules).files[0].specs == {"x": spec(4)}
    plan = plan_export([{"a": spec(2)}, {"b": spec(2)}], rules, sizes=[(2, 2), (2, 2)])
    assert [(file.place, file.replica, file.shard, file.helpers, file.specs) for file in plan.files] == [(0, 0, 0, (1,), {"x": spec(4)})]
    assert plan.writers_of(0, 0) == plan.writers_of(1, 0) == {"x": 0}
    assert plan.writers_of(0, 1) == plan.writers_of(1, 1) == {}
    with pytest.raises(ConversionError, match=r"1 tensor \(x\) whose rows are not all there once"):
        plan_export([{"a": spec(2)}, {"c": spec(2)}], [Half("a", "x"), Half("a2", "x"), Rename("c", "y")][::2])


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("200mb", 2 * 10**8), (77, 77), ("12", 12), ("1T", 10**12)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size
    for wrong in (f"-{text}", f"{text}x", "", "GB", "0"):
        with pytest.raises(ConversionError):
            parse_size(wrong)
