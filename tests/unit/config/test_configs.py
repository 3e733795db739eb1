"""Whole configs: flat and back, checks of combinations, flags without effect."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.config import Config, DataSection, ExportConfig, InferConfig, ModelSection, SftConfig, parse_command, warnings_for
from mswift.config.fields import Flag, plain
from mswift.errors import ConfigError

CLASSES = [SftConfig, InferConfig, ExportConfig]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


def values_of(flag: Flag) -> st.SearchStrategy[Any]:
    """Valid values of a flag."""
    low = flag.limits.low if flag.limits.low is not None else 0
    high = flag.limits.high if flag.limits.high is not None else flag.limits.below if flag.limits.below is not None else 1e6
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "text": st.sampled_from(flag.choices) if flag.choices else TEXT,
        "int": st.integers(int(low), 10**6),
        "float": st.floats(low, high, exclude_max=flag.limits.below is not None, exclude_min=flag.limits.above is not None),
        "bool": st.booleans(),
        "list": st.lists(st.sampled_from(flag.choices) if flag.choices else TEXT, max_size=3),
        "dict": st.dictionaries(TEXT, TEXT, max_size=2),
    }
    found = st.just("700MB") if flag.limits.pattern else kinds[flag.kind]
    return st.none() | found if flag.optional else found


def flats(config_class: type[Config]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: values_of(flag) for name, flag in config_class.flags().items()})


@pytest.mark.parametrize("config_class", CLASSES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_flat_and_back(config_class: type[Config], data: st.DataObject) -> None:
    flat = data.draw(flats(config_class))
    config = config_class.from_flat(flat)
    written = json.loads(json.dumps(config.to_flat(secrets=True)))
    assert config_class.from_flat(written) == config
    assert {name: written[name] for name in flat} == flat
    assert list(written) == list(config_class.flags())
    assert config.changed() == {name for name in flat if flat[name] != config_class.flags()[name].default}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_command_line_says_the_same_as_a_mapping(data: st.DataObject) -> None:
    flat = {"model": "m", "dataset": ["d"], **data.draw(flats(SftConfig))}
    words = [f"--{name}={json.dumps(value) if isinstance(value, dict) else plain_exact(value)}" for name, value in flat.items() if not listed(value)]
    for name, value in flat.items():
        if listed(value) and value and not any(item.startswith("--") for item in value):
            words += [f"--{name}", *value]
    expected = SftConfig.from_flat({name: value for name, value in flat.items() if any(word.split("=")[0] == f"--{name}" for word in words)})
    wrong = fault(expected)
    if wrong:
        with pytest.raises(ConfigError) as caught:
            parse_command("sft", words)
        assert str(caught.value) == wrong
    else:
        assert parse_command("sft", words) == expected


def fault(config: Config) -> str:
    try:
        config.check()
    except ConfigError as error:
        return str(error)
    return ""


def listed(value: object) -> bool:
    return value is None or isinstance(value, list)


def plain_exact(value: object) -> str:
    return repr(value) if isinstance(value, float) else plain(value)


def test_secrets_are_not_written() -> None:
    config = SftConfig(model=ModelSection(model="m", hub_token="hf_secret"))
    assert config.to_flat()["hub_token"] is None
    assert config.to_flat(secrets=True)["hub_token"] == "hf_secret"
    assert "hf_secret" not in json.dumps(config.to_flat())


def test_defaults_are_not_shared() -> None:
    first, second = SftConfig(), SftConfig()
    first.data.dataset.append("a")
    assert second.data.dataset == []
    assert SftConfig.flags()["dataset"].default == []


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"lora_rnk": 8}, "args.json: lora_rnk is not a setting of mswift sft; did you mean lora_rank?"),
        ({"zzz": 8}, "args.json: zzz is not a setting of mswift sft"),
        ({"lora_rank": "a"}, "args.json: lora_rank: got 'a', wanted a whole number, at least 1"),
    ],
)
def test_a_flat_mapping_is_strict(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SftConfig.from_flat(flat, "args.json")
    assert str(caught.value) == message


def sft(**flat: Any) -> SftConfig:
    return SftConfig.from_flat({"model": "org/name", "dataset": ["d.jsonl"], **flat})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SftConfig(), "--model is required: give a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or the directory of a checkpoint"),
        (InferConfig(), "--model is required: give a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or the directory of a checkpoint"),
        (SftConfig(model=ModelSection(model="m")), "--dataset is required: give one or more files, folders or hub ids"),
        (
            sft(decoder_first_pipeline_num_layers=3),
            "--decoder_first_pipeline_num_layers needs --pipeline_model_parallel_size of at least 2; there is one stage",
        ),
        (
            sft(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tL", account_for_loss_in_pipeline_split=True),
            "--pipeline_model_parallel_layout and --account_for_loss_in_pipeline_split each say how layers are divided into stages; give one of them",
        ),
        (
            sft(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|t"),
            "--pipeline_model_parallel_layout: got 'Et|t', wanted one E (the embedding) first, then layers t, then layers m, one L (the loss) last",
        ),
        (
            sft(tuner_type="full", adapters=["a"]),
            "--adapters needs --tuner_type lora; to train every weight, merge the adapter first (mswift merge-lora)",
        ),
        (
            InferConfig.from_flat({"model": "m", "context_parallel_size": 2}),
            "--context_parallel_size is 2, wanted 1: new tokens come one at a time",
        ),
        (sft(adapters=["a", "b"]), "--adapters: got 2 adapters, wanted one to go on training"),
        (sft(quant_bits=4), "--quant_bits needs --quant_method bnb beside it"),
        (sft(quant_method="bnb"), "--quant_method needs --quant_bits 4 or 8 beside it"),
        (sft(quant_method="bnb", quant_bits=3), "--quant_bits: got 3, wanted 4 (nf4) or 8 (int8)"),
        (
            sft(quant_method="bnb", quant_bits=8, tuner_type="full"),
            "--quant_bits 8 is for frozen weights, and --tuner_type full trains them all; make it lora",
        ),
        (
            sft(quant_method="bnb", quant_bits=4, use_dora=True),
            "--quant_bits 4 does not go with --use_dora true, which needs the norms of plain weights; leave one of them out",
        ),
        (
            sft(quant_method="bnb", quant_bits=4, torch_dtype="float32", bnb_4bit_compute_dtype="bfloat16"),
            "--bnb_4bit_compute_dtype bfloat16 differs from --torch_dtype float32; "
            "products are computed in the dtype of the model, so give one of the two",
        ),
        (sft(target_modules=[]), "--target_modules is empty, wanted all-linear or names of layers"),
        (sft(min_lr=1.0), "--min_lr 1 is above the learning rate 0.0001; make it smaller"),
        (
            sft(overwrite_output_dir=True, resume_from_checkpoint="auto"),
            "--overwrite_output_dir starts anew and --resume_from_checkpoint goes on; give one of them",
        ),
        (ExportConfig.from_flat({"model": "m", "merge_lora": True}), "--adapters is required to merge: give the folder of a PEFT adapter"),
        (
            SftConfig(model=ModelSection(model="m"), data=DataSection(dataset=["d"], data_seed=-1)),
            "--data_seed: got -1, wanted a whole number, at least 0",
        ),
    ],
)
def test_combinations_that_cannot_run(config: Config, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.check()
    assert str(caught.value) == message


def test_good_configs_pass() -> None:
    for config in (sft(), sft(tuner_type="full"), InferConfig.from_flat({"model": "m"}), ExportConfig.from_flat({"model": "m", "adapters": ["a"]})):
        config.check()
        assert warnings_for(config) == []


@pytest.mark.parametrize(
    ("config", "warnings"),
    [
        (sft(tuner_type="full", lora_rank=4), ["--lora_rank has no effect: --tuner_type is full"]),
        (sft(recompute_method="block"), ["--recompute_method has no effect: it needs --recompute_granularity full"]),
        (sft(recompute_method="block", recompute_granularity="full"), []),
        (sft(mtp_loss_scaling_factor=0.3), ["--mtp_loss_scaling_factor has no effect: it needs --mtp_num_layers"]),
        (sft(max_steps=3, num_train_epochs=1), ["--num_train_epochs has no effect: --max_steps wins"]),
        (sft(warmup_steps=3, warmup_ratio=0.1), ["--warmup_ratio has no effect: --warmup_steps wins"]),
        (sft(lr_scheduler_type="constant", min_lr=1e-6), ["--min_lr has no effect: --lr_scheduler_type is constant"]),
        (sft(sequence_parallel=True), ["--sequence_parallel has no effect: it needs --tensor_model_parallel_size of at least 2"]),
        (sft(sequence_parallel=True, tensor_model_parallel_size=2), []),
        (sft(val_dataset=["v"], split_dataset_ratio=0.1), ["--split_dataset_ratio has no effect: --val_dataset is the evaluation set"]),
        (sft(eval_steps=7), ["--eval_steps has no effect: there is no evaluation set; give --val_dataset or --split_dataset_ratio"]),
        (
            InferConfig.from_flat({"model": "m", "result_path": "r", "temperature": 0, "top_p": 0.5}),
            ["--result_path has no effect: there is no --val_dataset", "--top_p has no effect: --temperature is 0"],
        ),
        (InferConfig.from_flat({"model": "m", "dataset": ["d"]}), ["--dataset has no effect: infer answers the rows of --val_dataset"]),
    ],
)
def test_flags_without_effect_warn(config: Config, warnings: list[str]) -> None:
    assert warnings_for(config) == warnings
    assert all("\n" not in line for line in warnings)


@pytest.mark.parametrize("config", [sft(tuner_type="full"), InferConfig(), ExportConfig()])
def test_idle_names_are_flags(config: Config) -> None:
    names = {name for names, _ in config.idle() for name in names}
    assert names
    assert names <= set(config.flags())


def test_values_that_follow_from_others() -> None:
    assert sft().learning_rate == 1e-4
    assert sft(tuner_type="full").learning_rate == 1e-5
    assert sft(tuner_type="full", learning_rate=3e-5).learning_rate == 3e-5
    assert sft(save_steps=7).eval_steps == 7
    assert sft(save_steps=7, eval_steps=3).eval_steps == 3
    assert not sft().has_evaluation
    assert sft(split_dataset_ratio=0.1).has_evaluation
    assert str(sft().output_dir()) == "output/name"
    assert str(sft(model="/models/here/").output_dir()) == "output/here"
    now = datetime.datetime(2025, 3, 4, 5, 6, 7)
    assert str(sft(output_dir="out", add_version=True).output_dir(now)) == "out/v0-20250304-050607"
    assert sft().effective() == {"learning_rate": 1e-4, "eval_steps": 500, "output_dir": "output/name", "global_batch_size": 16}


def test_configs_are_plain_dataclasses() -> None:
    for config_class in CLASSES:
        assert dataclasses.is_dataclass(config_class)
        assert not hasattr(config_class(), "__dict__")
    assert SftConfig() == SftConfig()
