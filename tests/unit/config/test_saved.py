"""What an adapter or a model brings along in args.json and adapter_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mswift.config import parse_command, read_command
from mswift.errors import ConfigError


def adapter(folder: Path, args: dict[str, Any] | None = None, base: str | None = "org/base") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    if args is not None:
        (folder / "args.json").write_text(json.dumps(args))
    return str(folder)


def test_our_own_args_json_completes_infer_and_export(tmp_path: Path) -> None:
    words = "--model org/m --dataset d --system hi --torch_dtype bfloat16 --trust_remote_code --max_length 99 --seed 3"
    trained = parse_command("sft", words.split())
    folder = adapter(tmp_path / "out", trained.to_flat())
    config = parse_command("infer", ["--adapters", folder])
    assert (config.model.model, config.model.torch_dtype, config.template.system, config.data.max_length) == ("org/m", "bfloat16", "hi", 99)
    assert config.model.trust_remote_code is False
    assert (config.data.dataset, config.generation.seed) == ([], None)
    assert parse_command("merge-lora", ["--adapters", folder]).model.model == "org/m"


def test_flags_and_the_environment_win(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "out", {"model": "org/m", "system": "hi", "use_hf": False})
    config = parse_command("infer", ["--adapters", folder, "--model", "other", "--system", "no"])
    assert (config.model.model, config.template.system, config.model.use_hf) == ("other", "no", False)
    assert read_command("infer", ["--adapters", folder], {"USE_HF": "1"}).config.model.use_hf is True


def test_ms_swift_args_json_with_old_names(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "out", {"model_id_or_path": "org/old", "dtype": "bf16", "template": "qwen", "sft_type": "lora", "lora_rank": 8})
    parsed = read_command("infer", ["--adapters", folder], {})
    assert parsed.config.model.model == "org/old"
    assert parsed.config.model.torch_dtype == "bfloat16"
    assert parsed.notes == (f"from {folder}/args.json: model org/old, torch_dtype bf16",)


def test_a_checkpoint_reads_the_file_of_its_run(tmp_path: Path) -> None:
    adapter(tmp_path / "out", {"model": "org/run"})
    folder = adapter(tmp_path / "out" / "checkpoint-7")
    assert parse_command("infer", ["--adapters", folder]).model.model == "org/run"
    assert parse_command("infer", ["--adapters", adapter(tmp_path / "out" / "best")]).model.model == "org/base"


def test_a_peft_adapter_names_its_base_model(tmp_path: Path) -> None:
    parsed = read_command("infer", ["--adapters", adapter(tmp_path / "a")], {})
    assert parsed.config.model.model == "org/base"
    assert parsed.notes == (f"from {tmp_path / 'a'}/adapter_config.json: model org/base",)
    with pytest.raises(ConfigError, match=r"^--model is required"):
        parse_command("infer", ["--adapters", adapter(tmp_path / "b", base=None)])
    with pytest.raises(ConfigError, match=r"^--model is required"):
        parse_command("infer", ["--adapters", adapter(tmp_path / "a"), "--load_args", "false"])


def test_a_trained_model_brings_its_template_only(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(json.dumps({"model": "org/base", "system": "hi", "torch_dtype": "float32"}))
    config = parse_command("infer", ["--model", str(tmp_path)])
    assert (config.model.model, config.model.torch_dtype, config.template.system) == (str(tmp_path), None, "hi")
    (tmp_path / "args.json").write_text(json.dumps({"template": "chatml"}))
    assert parse_command("infer", ["--model", str(tmp_path)]).template.template == "chatml"
    assert parse_command("sft", ["--model", str(tmp_path), "--dataset", "d"]).template.system is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); mend it, or give --load_args false"),
        ("[]", "holds no JSON object; mend it, or give --load_args false"),
        ('{"torch_dtype": "int8"}', ": torch_dtype: got 'int8', wanted one of bfloat16, float32"),
    ],
)
def test_broken_files(content: str, message: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (tmp_path / "a" / "args.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse_command("infer", ["--adapters", folder])
    assert str(caught.value).replace(f"{folder}/args.json", "").strip() == message
    assert str(caught.value).startswith(f"{folder}/args.json")
