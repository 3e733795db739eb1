"""Sections: their size, their uniqueness, and the arithmetic of batches."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.config import ExportConfig, InferConfig, ParallelSection, SftConfig, TrainSection
from mswift.errors import ConfigError
from mswift.parallel.layout import ParallelLayout


@pytest.mark.parametrize("config_class", [SftConfig, InferConfig, ExportConfig])
def test_sections_are_small_and_flags_unique(config_class: type[SftConfig]) -> None:
    names: list[str] = []
    for section, section_class in config_class.sections().items():
        fields = [field.name for field in dataclasses.fields(section_class)]
        assert 1 <= len(fields) <= 25, section
        assert section_class.__doc__, section
        names += fields
    assert len(names) == len(set(names))
    assert list(config_class.flags()) == names


def test_a_misspelt_attribute_is_an_error() -> None:
    with pytest.raises(AttributeError):
        TrainSection().max_stps = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        TrainSection(max_stps=3)  # type: ignore[call-arg]
    assert TrainSection(max_steps=3).max_steps == 3


@pytest.mark.parametrize(
    ("train", "data_parallel", "expected"),
    [
        (TrainSection(), 1, 16),
        (TrainSection(), 4, 16),
        (TrainSection(micro_batch_size=4, global_batch_size=32), 2, 32),
        (TrainSection(micro_batch_size=2, gradient_accumulation_steps=3), 4, 24),
        (TrainSection(micro_batch_size=2, gradient_accumulation_steps=3, global_batch_size=24), 4, 24),
    ],
)
def test_global_batch_size(train: TrainSection, data_parallel: int, expected: int) -> None:
    got = train.resolve_global_batch_size(data_parallel)
    assert got == expected
    assert got % (train.micro_batch_size * data_parallel) == 0


@pytest.mark.parametrize(
    ("train", "data_parallel", "message"),
    [
        (
            TrainSection(micro_batch_size=3),
            2,
            "--global_batch_size 16 (the default) is not a multiple of micro_batch_size(3) x data parallel(2) = 6; the nearest above is 18",
        ),
        (
            TrainSection(global_batch_size=5),
            2,
            "--global_batch_size 5 is not a multiple of micro_batch_size(1) x data parallel(2) = 2; the nearest above is 6",
        ),
        (
            TrainSection(micro_batch_size=2, gradient_accumulation_steps=3, global_batch_size=16),
            1,
            "--global_batch_size is 16, but micro_batch_size(2) x data parallel(1) x gradient_accumulation_steps(3) = 6; give one of the two flags",
        ),
    ],
)
def test_batches_that_do_not_fit(train: TrainSection, data_parallel: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train.resolve_global_batch_size(data_parallel)
    assert str(caught.value) == message
    assert "\n" not in message


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_accumulation_and_global_batch_say_the_same(micro: int, steps: int, data_parallel: int) -> None:
    by_steps = TrainSection(micro_batch_size=micro, gradient_accumulation_steps=steps).resolve_global_batch_size(data_parallel)
    by_size = TrainSection(micro_batch_size=micro, global_batch_size=by_steps).resolve_global_batch_size(data_parallel)
    assert by_steps == by_size == micro * steps * data_parallel


def test_sizes_feed_the_layout() -> None:
    section = ParallelSection(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3)
    layout = ParallelLayout(world=8, **section.sizes())
    assert (layout.tp, layout.pp, layout.vpp, layout.dp) == (2, 2, 3, 2)
    assert ParallelLayout(world=1, **ParallelSection().sizes()) == ParallelLayout()
