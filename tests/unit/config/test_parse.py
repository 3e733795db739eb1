"""From words and files to configs: precedence, old names, and one exact line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mswift.config import ExportConfig, InferConfig, SftConfig, parse_command, read_command
from mswift.config.parse import CONFIGS
from mswift.errors import ConfigError

BASE = ["--model", "m", "--dataset", "d.jsonl"]


def sft(words: str) -> SftConfig:
    return parse_command("sft", [*BASE, *words.split()])


def changed(words: str) -> dict[str, Any]:
    """Flags that differ from the defaults, without the model and the data."""
    config = sft(words)
    flat = config.to_flat()
    return {name: flat[name] for name in config.changed() - {"model", "dataset"}}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--lora_rank 4", {"lora_rank": 4}),
        ("--lora-rank=4", {"lora_rank": 4}),
        ("--lora_rank 4 --lora_rank 5", {"lora_rank": 5}),
        ("--use_rslora", {"use_rslora": True}),
        ("--use_rslora --lora_rank 4", {"use_rslora": True, "lora_rank": 4}),
        ("--use-rslora TRUE", {"use_rslora": True}),
        ("--no_plot", {"plot": False}),
        ("--no_plot false", {}),
        ("--target_modules q_proj v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("--target_modules q_proj --target_modules k_proj", {"target_modules": ["k_proj"]}),
        ("--report_to none", {"report_to": []}),
        ("--max_length null", {}),
        ('--columns {"q":"query"}', {"columns": {"q": "query"}}),
        ("--learning_rate 1e-5", {"learning_rate": 1e-5}),
    ],
)
def test_words(words: str, expected: dict[str, Any]) -> None:
    assert changed(words) == expected
    assert changed(words) == expected  # reading leaves nothing behind


def test_values_may_look_like_anything_after_an_equals_sign() -> None:
    config = parse_command("sft", [*BASE, "--system=--be brief = good", "--response_prefix", "-1"])
    assert config.template.system == "--be brief = good"
    assert config.template.response_prefix == "-1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train_type full", {"tuner_type": "full"}),
        ("--sft_type full", {"tuner_type": "full"}),
        ("--tuner_type full", {"tuner_type": "full"}),
        ("--lr 1e-5 --min_lr 1e-6 --lr_decay_style linear", {"learning_rate": 1e-5, "min_lr": 1e-6, "lr_scheduler_type": "linear"}),
        ("--lr_warmup_fraction 0.05 --clip_grad 0.5", {"warmup_ratio": 0.05, "max_grad_norm": 0.5}),
        ("--train_iters 7 --max_epochs 2", {"max_steps": 7, "num_train_epochs": 2.0}),
        ("--per_device_train_batch_size 2", {"micro_batch_size": 2}),
        ("--batch_size 2 --acc_steps 4", {"micro_batch_size": 2, "gradient_accumulation_steps": 4}),
        ("--gradient_checkpointing true", {"recompute_granularity": "full"}),
        ("--gradient_checkpointing", {"recompute_granularity": "full"}),
        ("--gradient_checkpointing false", {}),
        ("--use_cpu true", {"device": "cpu"}),
        ("--use_cpu false", {}),
        ("--bf16 true --fp16 false", {"torch_dtype": "bfloat16"}),
        ("--fp32", {"torch_dtype": "float32"}),
        ("--dtype bf16", {"torch_dtype": "bfloat16"}),
        ("--torch_dtype torch.bfloat16", {"torch_dtype": "bfloat16"}),
        ("--torch_dtype bfloat16 --torch_dtype auto", {}),
        ("--distributed_timeout_minutes 2", {"ddp_timeout": 120}),
        ("--tp 2 --pp 4", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}),
        ("--save_interval 9 --log_interval 2 --save out", {"save_steps": 9, "logging_steps": 2, "output_dir": "out"}),
        ("--max_steps -1 --save_total_limit 0", {}),
        ("--lora_target_modules ALL --lora_dropout_p 0", {"lora_dropout": 0.0}),
        ("--lr_scheduler_type constant_with_warmup", {"lr_scheduler_type": "constant"}),
        ("--neat_packing true", {"packing": True}),
        ("--packing false --streaming false --task_type causal_lm --tuner_backend peft", {}),
        ("--attn_impl flash_attn --num_workers 4 --freeze_vit true", {"dataloader_num_workers": 4}),
        ("--seq_length 512 --eval_interval 3", {"max_length": 512, "eval_steps": 3}),
    ],
)
def test_names_that_ms_swift_has_used(words: str, expected: dict[str, Any]) -> None:
    assert changed(words) == expected
    assert sft(words).to_flat()["model"] == "m"


def test_old_and_idle_names_are_noted_once() -> None:
    words = [*BASE, "--lr", "1e-5", "--train_type", "lora", "--dataloader_pin_memory", "true", "--lazy_tokenize", "--fp32"]
    parsed = read_command("sft", words, {})
    assert parsed.notes == (
        "read as: --lr -> --learning_rate, --train_type -> --tuner_type, --fp32 -> --torch_dtype float32",
        "--dataloader_pin_memory, --lazy_tokenize have no effect: mswift arranges the loading of data by itself",
    )
    assert parsed.given == {"model", "dataset", "learning_rate", "tuner_type", "torch_dtype"}
    assert read_command("sft", BASE, {}).notes == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_rnk 4", "--lora_rnk is not a flag of mswift sft; did you mean --lora_rank?"),
        ("--trian_type full", "--trian_type is not a flag of mswift sft; did you mean --tuner_type?"),
        ("--zzz", "--zzz is not a flag of mswift sft; mswift sft --help lists all"),
        ("--result_path x", "--result_path is a flag of mswift infer, not of mswift sft"),
        ("--exist_ok", "--exist_ok is a flag of mswift export, not of mswift sft"),
        ("--deepspeed zero2", "--deepspeed is not supported yet; the optimizer state is spread over processes with --use_distributed_optimizer true"),
        ("--torch_compile true", "--torch_compile is not supported yet"),
        ("--torch_compile", "--torch_compile is not supported yet"),
        ("--use_galore true", "--use_galore is not supported yet"),
        ("--task_type seq_cls", "--task_type is not supported yet"),
        ("--mcore_adapter d", "--mcore_adapter is a flag of mswift export, not of mswift sft"),
        ("--fp16 true", "--fp16: float16 is not supported yet, wanted one of bfloat16, float32"),
        ("--torch_dtype float16", "--torch_dtype: float16 is not supported yet, wanted one of bfloat16, float32"),
        ("--quant_method hqq", "--quant_method: hqq is not supported yet, wanted one of bnb"),
        ("--bnb_4bit_quant_type fp4", "--bnb_4bit_quant_type: fp4 is not supported yet, wanted one of nf4"),
        ("--tuner_type adalora", "--tuner_type: adalora is not supported yet, wanted one of lora, full"),
        ("--report_to tensorboard wandb", "--report_to: wandb is not supported yet, wanted one or more of tensorboard"),
        ("--lora_rank", "--lora_rank: got nothing, wanted a whole number, at least 1"),
        ("--lora_rank 1 2", "--lora_rank: got 2 values ('1 2'), wanted a whole number, at least 1"),
        ("--target_modules", "--target_modules: got nothing, wanted one or more texts"),
        ("--lr x", "--lr: got 'x', wanted a number, above 0"),
        ("--gradient_checkpointing x", "--gradient_checkpointing: got 'x', wanted true or false"),
        ("--no_plot x", "--no_plot: got 'x', wanted true or false"),
        ("--distributed_timeout_minutes x", "--distributed_timeout_minutes: got 'x', wanted a whole number of minutes"),
        ("--sequence_parallel 2", "--sequence_parallel: got '2', wanted true or false"),
    ],
)
def test_mistakes_on_the_command_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sft(words)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("verb", "argv", "message"),
    [
        ("sft", ["x"], "got 'x', wanted a flag such as --model, or a file that ends in .yaml, .yml or .json, first"),
        ("sft", ["-1", *BASE], "got '-1', wanted a flag such as --model, or a file that ends in .yaml, .yml or .json, first"),
        ("sft", [], "--model is required: give a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or the directory of a checkpoint"),
        ("sft", ["--model", "m"], "--dataset is required: give one or more files, folders or hub ids"),
        ("infer", ["--model", "m", "--lora_rank", "4"], "--lora_rank is a flag of mswift sft and pt, not of mswift infer"),
        ("export", ["--seed", "4"], "--seed is a flag of mswift sft, pt and infer, not of mswift export"),
        ("merge-lora", ["--model", "m"], "--adapters is required to merge: give the folder of a PEFT adapter"),
        ("sft", ["missing.yaml"], "missing.yaml cannot be read: No such file or directory; check its name"),
    ],
)
def test_mistakes_of_the_whole_line(verb: str, argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_command(verb, argv, {})
    assert str(caught.value) == message


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf8")
    return str(path)


def test_a_file_may_be_flat_or_in_sections_and_flags_win(tmp_path: Path) -> None:
    flat = write(tmp_path / "a.yaml", "model: m\ndataset: [d.jsonl, e.jsonl]\nlearning_rate: 1e-5\nlora_rank: 4\nmax_length: null\nplot: false\n")
    nested = write(
        tmp_path / "b.yml",
        "model: {model: m}\ndata:\n  dataset: [d.jsonl, e.jsonl]\noptim:\n  lr: 1e-5\ntuner: {lora-rank: 4}\nlogging: {plot: 'false'}\ntrain:\n",
    )
    as_json = write(
        tmp_path / "c.json", json.dumps({"model": "m", "dataset": ["d.jsonl", "e.jsonl"], "learning_rate": 1e-5, "lora_rank": 4, "plot": False})
    )
    configs = [parse_command("sft", [path]) for path in (flat, nested, as_json)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].data.dataset == ["d.jsonl", "e.jsonl"]
    assert configs[0].optim.learning_rate == 1e-5
    assert configs[0].data.max_length is None
    assert configs[0].logging.plot is False
    over = parse_command("sft", ["--config", flat, "--lora_rank", "6", "--dataset", "x"])
    assert (over.tuner.lora_rank, over.data.dataset) == (6, ["x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 4", "lora_rnk is not a flag of mswift sft; did you mean lora_rank?"),
        ("lora_rank: x", "lora_rank: got 'x', wanted a whole number, at least 1"),
        ("tuner: {lora_rank: x}", "tuner: lora_rank: got 'x', wanted a whole number, at least 1"),
        ("train: {lora_rank: 4}", "train: lora_rank belongs to section tuner; move it there"),
        ("output_dir: 2024", "output_dir: got 2024, wanted a text; put quotes around it"),
        ("dataset: [1]", "dataset: got [1], wanted one or more texts; put quotes around it"),
        ("plot: 3", "plot: got 3, wanted true or false"),
        ("torch_compile: true", "torch_compile is not supported yet"),
        ("- a", "got ['a'], wanted flags and values such as 'learning_rate: 1e-4'"),
        ("ENV: [A]", "ENV: got ['A'], wanted names and values such as 'OMP_NUM_THREADS: 2'"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError) as caught:
        parse_command("sft", [path, *BASE])
    assert str(caught.value) == f"{path}: {message}"


def test_old_names_in_a_file(tmp_path: Path) -> None:
    lines = "gradient_checkpointing: true\nuse_cpu: true\nno_plot: true\ndistributed_timeout_minutes: 3\nbf16: true\nmax_steps: -1\n"
    path = write(tmp_path / "run.yaml", f"{lines}custom_train_dataset_path: [a, b]\nmodel_id_or_path: m\ntrain_type: full\npacking: false\n")
    parsed = read_command("sft", [path], {})
    flat = parsed.config.to_flat()
    assert {name: flat[name] for name in parsed.config.changed()} == {
        "recompute_granularity": "full",
        "device": "cpu",
        "plot": False,
        "ddp_timeout": 180,
        "torch_dtype": "bfloat16",
        "dataset": ["a", "b"],
        "model": "m",
        "tuner_type": "full",
    }
    assert parsed.notes[0].startswith(f"read as: {path}: gradient_checkpointing -> --recompute_granularity full, {path}: use_cpu -> --device cpu, ")
    assert len(parsed.notes) == 1


def test_files_that_cannot_be_parsed(tmp_path: Path) -> None:
    broken_yaml, broken_json = write(tmp_path / "a.yaml", "a: 1\nb: [1"), write(tmp_path / "a.json", '{"a": 1,\n}')
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for path, start in (
        (broken_yaml, ", line 2: not YAML: "),
        (broken_json, ", line 2: not JSON: "),
        (str(tmp_path / "b.yaml"), " cannot be read: "),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_command("sft", [path])
        assert str(caught.value).startswith(f"{path}{start}")
        assert "\n" not in str(caught.value)
    assert parse_command("sft", [write(tmp_path / "empty.yaml", ""), *BASE]).model.model == "m"


def test_env_block(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "ENV:\n  NPROC_PER_NODE: 2\n  A_SWITCH: true\n  USE_HF: 0\n  NOTHING: null\n")
    parsed = read_command("sft", [path, *BASE], {"NPROC_PER_NODE": "4"})
    assert parsed.env == {"A_SWITCH": "true", "USE_HF": "0"}
    assert parsed.notes == (f"{path}: ENV NPROC_PER_NODE is 2, but the environment already has 4, which wins",)
    assert parsed.config.to_flat()["use_hf"] is False
    assert read_command("sft", [path, *BASE, "--use_hf", "true"], {}).config.to_flat()["use_hf"] is True


def test_use_hf_from_the_environment() -> None:
    assert read_command("sft", BASE, {}).config.model.use_hf is True
    assert read_command("sft", BASE, {"USE_HF": "0"}).config.model.use_hf is False
    assert read_command("sft", BASE, {"USE_HF": ""}).config.model.use_hf is True
    with pytest.raises(ConfigError, match=r"^USE_HF in the environment: got 'x', wanted true or false$"):
        read_command("sft", BASE, {"USE_HF": "x"})


def test_verbs_and_their_configs() -> None:
    own = {verb: verb for verb in ("sft", "pt", "infer", "export", "verify", "data")}
    assert {verb: config.verb for verb, config in CONFIGS.items()} == {**own, "merge-lora": "export"}
    assert isinstance(parse_command("infer", ["--model", "m"]), InferConfig)
    merge = parse_command("merge-lora", ["--model", "m", "--adapters", "a"])
    assert isinstance(merge, ExportConfig)
    assert merge.export.merge_lora is True
    assert parse_command("export", ["--model", "m", "--adapters", "a"]).export.merge_lora is False


def test_ckpt_dir_is_an_adapter_or_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    adapter = parse_command("infer", ["--ckpt_dir", str(tmp_path)])
    assert (adapter.infer.adapters, adapter.model.model) == ([str(tmp_path)], "org/base")
    model = parse_command("infer", ["--ckpt_dir", str(tmp_path / "full")])
    assert (model.infer.adapters, model.model.model) == ([], str(tmp_path / "full"))


JUNK = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["--model", "--lora_rank", "--dataset", "--plot", "--x", "--", "-", "true", "3", "run.yaml", "--columns", "{}", "--fp16"]),
)


@given(st.lists(JUNK, max_size=8))
def test_any_words_give_a_config_or_one_line(words: list[str]) -> None:
    got = outcome(words)
    if isinstance(got, str):
        assert got
        assert len(got.splitlines()) == 1
    else:
        assert got.model.model
        assert got.data.dataset


def outcome(words: list[str]) -> SftConfig | str:
    try:
        return parse_command("sft", words)
    except ConfigError as error:
        return str(error)


def test_yaml_of_a_config_reads_back(tmp_path: Path) -> None:
    config = sft("--lora_rank 4 --target_modules a b --learning_rate 1e-5 --report_to none --system hello")
    path = write(tmp_path / "run.yaml", yaml.safe_dump(config.to_flat()))
    assert parse_command("sft", [path]) == config
    nested: dict[str, dict[str, Any]] = {}
    for name, value in config.to_flat().items():
        nested.setdefault(SftConfig.flags()[name].section, {})[name] = value
    assert parse_command("sft", [write(tmp_path / "nested.yaml", yaml.safe_dump(nested))]) == config
