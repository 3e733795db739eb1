"""The tables of old names: consistent, and complete for what ms-swift's users write."""

from __future__ import annotations

import pytest

from mswift.config import ExportConfig, InferConfig, SftConfig, aliases, parse_command
from mswift.config.known import NOT_YET, SWITCHES_OFF

OURS = {**SftConfig.flags(), **InferConfig.flags(), **ExportConfig.flags()}
KNOWN = set(OURS) | set(NOT_YET) | set(aliases.NO_EFFECT) | set(aliases.NEUTRAL)


def test_renamed_names_lead_to_known_ones_in_one_step() -> None:
    assert {old: new for old, new in aliases.RENAMED.items() if new not in KNOWN} == {}
    assert set(aliases.RENAMED.values()).isdisjoint(aliases.RENAMED)
    assert set(aliases.RENAMED).isdisjoint(OURS)


def test_tables_do_not_contradict_each_other() -> None:
    assert set(NOT_YET).isdisjoint(OURS)
    assert set(NOT_YET).isdisjoint(aliases.RENAMED)
    assert set(NOT_YET).isdisjoint(aliases.NO_EFFECT)
    assert set(aliases.SWITCHES).isdisjoint(OURS)
    assert SWITCHES_OFF < NOT_YET
    targets = [pair for states in aliases.SWITCHES.values() for pair in states.values() if pair is not None]
    assert {name for name, _ in targets} <= KNOWN


@pytest.mark.parametrize("table", [aliases.VALUES, aliases.UNSUPPORTED_VALUES])
def test_values_belong_to_flags_of_ours(table: dict[str, object]) -> None:
    assert table
    assert set(table) <= set(OURS)


def test_old_values_become_allowed_ones() -> None:
    for name, pairs in aliases.VALUES.items():
        for old, new in pairs.items():
            unsupported = new in aliases.UNSUPPORTED_VALUES.get(name, ())
            assert unsupported or OURS[name].read(new, f"{name} {old}") == OURS[name].read(new, name)
            assert old != new
    for name, values in aliases.UNSUPPORTED_VALUES.items():
        assert values.isdisjoint(OURS[name].choices)


@pytest.mark.parametrize(
    "names",
    [
        "train_type custom_register_path load save adapter_load mcore_adapters save_interval log_interval num_workers seq_length no_rope_fusion",
        "sft_type model_id_or_path batch_size eval_batch_size acc_steps template_type dtype lora_target_modules use_flash_attn",
        "deepspeed fsdp packing streaming quant_bits rlhf_type vllm_gpu_memory_utilization num_generations moe_aux_loss_coeff fp8_format use_dora",
        "model_name_or_path finetuning_type cutoff_len interleave_probs lora_target flash_attn val_size export_dir neat_packing",
        "lr lr_warmup_fraction lr_decay_style clip_grad train_iters no_save_optim attention_backend cross_entropy_loss_fusion save_safetensors",
    ],
)
def test_what_users_of_ms_swift_write_is_known(names: str) -> None:
    handled = KNOWN | set(aliases.RENAMED) | set(aliases.SWITCHES)
    assert [name for name in names.split() if name not in handled] == []
    assert len(handled) > 700


@pytest.mark.parametrize("flag", ["use_liger_kernel", "use_liger", "enable_liger_kernel", "enable_unsloth", "use_unsloth"])
def test_names_of_other_kernels_mean_the_compiled_ones(flag: str) -> None:
    """`true` is --kernels auto; of two that contradict each other the later one holds, as with any flag; `false` changes nothing."""

    def kernels(words: str) -> str:
        return parse_command("sft", f"--model m --dataset d.jsonl {words}".split()).runtime.kernels

    assert kernels(f"--{flag} true") == kernels("") == "auto"
    assert kernels(f"--kernels reference --{flag} true") == "auto"
    assert kernels(f"--{flag} true --kernels reference") == "reference"
    assert kernels(f"--kernels rms_norm --{flag} false") == "rms_norm"
