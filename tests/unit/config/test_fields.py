"""One flag: reading, refusing, describing itself."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.config import ExportConfig, InferConfig, SftConfig
from mswift.config.fields import Limits, nearest, plain, shown
from mswift.errors import ConfigError

SFT = SftConfig.flags()


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("lora_rank", "16", 16),
        ("lora_rank", 16, 16),
        ("lora_rank", 16.0, 16),
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", 1, 1.0),
        ("learning_rate", None, None),
        ("max_length", "none", None),
        ("use_rslora", "True", True),
        ("use_rslora", 0, False),
        ("enable_thinking", "false", False),
        ("torch_dtype", "bfloat16", "bfloat16"),
        ("dataset", "a.jsonl", ["a.jsonl"]),
        ("dataset", ["a.jsonl#5", "b"], ["a.jsonl#5", "b"]),
        ("report_to", "none", []),
        ("report_to", [], []),
        ("columns", '{"q": "query"}', {"q": "query"}),
        ("columns", {"q": "query"}, {"q": "query"}),
        ("system", "none", "none"),
        ("max_shard_size", "500 MB", "500 MB"),
    ],
)
def test_reads(name: str, raw: object, value: object) -> None:
    got = SFT[name].read(raw, f"--{name}")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("lora_rank", "x", "--lora_rank: got 'x', wanted a whole number, at least 1"),
        ("lora_rank", "0", "--lora_rank: got '0', wanted a whole number, at least 1"),
        ("lora_rank", True, "--lora_rank: got true, wanted a whole number, at least 1"),
        ("lora_rank", 1.5, "--lora_rank: got 1.5, wanted a whole number, at least 1"),
        ("lora_rank", None, "--lora_rank: got nothing, wanted a whole number, at least 1"),
        ("learning_rate", "nan", "--learning_rate: got 'nan', wanted a number, above 0"),
        ("warmup_ratio", "1.5", "--warmup_ratio: got '1.5', wanted a number, at least 0 and at most 1"),
        ("split_dataset_ratio", 1, "--split_dataset_ratio: got 1, wanted a number, at least 0 and below 1"),
        ("use_rslora", "maybe", "--use_rslora: got 'maybe', wanted true or false"),
        ("tuner_type", "lra", "--tuner_type: got 'lra', wanted one of lora, full; did you mean lora?"),
        ("torch_dtype", "int8", "--torch_dtype: got 'int8', wanted one of bfloat16, float32"),
        ("output_dir", 2024, "--output_dir: got 2024, wanted a text; put quotes around it"),
        ("dataset", {"a": 1}, "--dataset: got {'a': 1}, wanted one or more texts; put quotes around it"),
        ("columns", "{a}", '--columns: got \'{a}\', wanted a JSON object such as {"from": "to"}'),
        ("columns", {"a": 1}, '--columns: got {\'a\': 1}, wanted a JSON object such as {"from": "to"}'),
        ("max_shard_size", "5 bananas", "--max_shard_size: got '5 bananas', wanted a size such as 5GB or 500MB"),
    ],
)
def test_refuses_in_one_line(name: str, raw: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SFT[name].read(raw, f"--{name}")
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("config_class", [SftConfig, InferConfig, ExportConfig])
def test_every_flag_explains_itself(config_class: type[SftConfig]) -> None:
    flags = config_class.flags().values()
    assert flags
    for flag in flags:
        assert 8 <= len(flag.help) <= 130, flag.name
        assert "\n" not in flag.help, flag.name
        assert not flag.help.endswith("."), flag.name
        assert flag.shown_default(), flag.name
        assert flag.default is None or flag.read(flag.default, flag.name) == flag.default or flag.auto == "required", flag.name
        assert flag.default is not None or flag.optional, flag.name


def test_limits_describe_what_they_hold() -> None:
    limits = Limits(low=0, below=1)
    assert [value for value in (-0.1, 0, 0.5, 1) if limits.hold(value)] == [0, 0.5]
    assert limits.describe() == "at least 0 and below 1"
    assert Limits(above=0, high=1).hold(1)
    assert not Limits(above=0, high=1).hold(0)
    assert Limits().describe() == ""


@given(st.text(max_size=12))
def test_numbers_read_as_python_reads_them_or_not_at_all(text: str) -> None:
    for name, convert in (("lora_rank", int), ("weight_decay", float)):
        got = outcome(name, text)
        if isinstance(got, str):
            assert got.startswith(f"{name}: got {shown(text)}, wanted ")
        else:
            assert got == convert(text)
            assert re.search(r"\d", text)


def outcome(name: str, text: str) -> float | str:
    try:
        return SFT[name].read(text, name)
    except ConfigError as error:
        return str(error)


def test_small_words() -> None:
    assert nearest("lora_rnk", ["lora_rank", "lora_alpha"]) == "lora_rank"
    assert nearest("zzz", ["lora_rank"]) is None
    assert [plain(value) for value in (True, ["a", "b"], [], 1e-4, 3.0, 7)] == ["true", "a b", "none", "0.0001", "3", "7"]
    assert len(shown("x" * 500)) == 80
