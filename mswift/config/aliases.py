"""Names that ms-swift's flags had in its versions 2 to 4, in Megatron-SWIFT and in its articles, and what to do with each.

`RENAMED` is one to one. `SWITCHES` are true/false flags that stand for a value of another flag. `NEUTRAL` are flags that mswift does not have but
whose listed values ask for what it does anyway. `NO_EFFECT` flags change speed or files there and nothing here: they warn.
"""

from __future__ import annotations

from typing import Any

_RENAMED = """
train_type:tuner_type sft_type:tuner_type finetuning_type:tuner_type
model_id_or_path:model model_name_or_path:model dtype:torch_dtype use_huggingface:use_hf
custom_train_dataset_path:dataset custom_val_dataset_path:val_dataset dataset_test_ratio:split_dataset_ratio val_size:split_dataset_ratio
dataset_seed:data_seed preprocess_num_proc:dataset_num_proc preprocessing_num_workers:dataset_num_proc
seq_length:max_length cutoff_len:max_length train_dataloader_shuffle:dataset_shuffle
lora_target_modules:target_modules lora_target:target_modules lora_dropout_p:lora_dropout
adapter_name_or_path:adapters lora_modules:adapters vllm_lora_modules:adapters mcore_adapters:mcore_adapter adapter_load:mcore_adapter
tp:tensor_model_parallel_size pp:pipeline_model_parallel_size megatron_parallel_size:tensor_model_parallel_size
sequence_parallel_size:context_parallel_size num_virtual_stages_per_pipeline_rank:virtual_pipeline_model_parallel_size
max_epochs:num_train_epochs train_iters:max_steps
per_device_train_batch_size:micro_batch_size batch_size:micro_batch_size acc_steps:gradient_accumulation_steps
per_device_eval_batch_size:max_batch_size eval_batch_size:max_batch_size
lr:learning_rate lr_decay_style:lr_scheduler_type lr_warmup_fraction:warmup_ratio lr_warmup_iters:warmup_steps
adam_eps:adam_epsilon clip_grad:max_grad_norm
save:output_dir export_dir:output_dir ollama_output_dir:output_dir hf_output_dir:output_dir megatron_output_dir:output_dir
quant_output_dir:output_dir add_output_dir_suffix:add_version merge_lora_and_save:merge_lora
save_interval:save_steps eval_interval:eval_steps log_interval:logging_steps
distributed_backend:ddp_backend result_dir:result_path load_args_from_ckpt_dir:load_args
load:model mcore_model:model output:output_dir ref_load:mcore_ref_model ref_adapter_load:mcore_ref_adapter
template_type:template prompt_template:template num_workers:dataloader_num_workers evaluation_strategy:eval_strategy
only_save_model:save_only_model flash_attn:attn_impl
interleave_probs:interleave_prob streaming_buffer_size:shuffle_buffer_size
custom_register_path:external_plugins deterministic_mode:full_determinism quantization_bit:quant_bits neftune_alpha:neftune_noise_alpha
bnb_4bit_comp_dtype:bnb_4bit_compute_dtype
"""
RENAMED: dict[str, str] = dict(pair.split(":") for pair in _RENAMED.split())
"""Old name -> the name that ms-swift 4 and mswift use."""

SWITCHES: dict[str, dict[bool, tuple[str, str] | None]] = {
    "gradient_checkpointing": {True: ("recompute_granularity", "full"), False: ("recompute_granularity", "none")},
    "use_cpu": {True: ("device", "cpu"), False: None},
    "no_cuda": {True: ("device", "cpu"), False: None},
    "bf16": {True: ("torch_dtype", "bfloat16"), False: None},
    "fp16": {True: ("torch_dtype", "float16"), False: None},
    "fp32": {True: ("torch_dtype", "float32"), False: None},
    "enable_unsloth": {True: ("kernels", "auto"), False: None},
    "use_unsloth": {True: ("kernels", "auto"), False: None},
    "use_liger_kernel": {True: ("kernels", "auto"), False: None},
    "use_liger": {True: ("kernels", "auto"), False: None},
    "enable_liger_kernel": {True: ("kernels", "auto"), False: None},
    "use_swanlab": {True: ("report_to", "swanlab"), False: None},
    "neat_packing": {True: ("packing", "true"), False: None},
}
"""True/false flag -> the flag and value that each state stands for; None for what happens anyway."""

NEUTRAL: dict[str, frozenset[str]] = {
    "task_type": frozenset({"causal_lm"}),
    "tuner_backend": frozenset({"peft"}),
    "infer_backend": frozenset({"transformers", "pt"}),
    "optim": frozenset({"adamw_torch", "adamw_torch_fused"}),
    "optimizer": frozenset({"adam", "default"}),
    "save_strategy": frozenset({"steps"}),
    "eval_strategy": frozenset({"steps"}),
    "logging_strategy": frozenset({"steps"}),
    "lora_bias": frozenset({"none"}),
    "use_chat_template": frozenset({"true"}),
    "template_backend": frozenset({"jinja", "swift"}),
    "calculate_per_token_loss": frozenset({"true"}),
    "average_tokens_across_devices": frozenset({"true"}),
    "save_safetensors": frozenset({"true"}),
    "load_safetensors": frozenset({"true"}),
    "safe_serialization": frozenset({"true"}),
    "load_best_model_at_end": frozenset({"false"}),
    "resume_only_model": frozenset({"false"}),
    "freeze_parameters_ratio": frozenset({"0", "0.0", "0."}),
    "stage": frozenset({"sft"}),
    "do_train": frozenset({"true"}),
    "finetune": frozenset({"true"}),
}
"""Flags of ms-swift that mswift does not have -> the values that it follows all the same."""

_NO_EFFECT = {
    "the architecture is read from the checkpoint": "model_type check_model",
    "kernels are chosen by the engine": """attn_impl attention_backend use_flash_attn cross_entropy_loss_fusion cross_entropy_fusion_impl
        apply_rope_fusion no_rope_fusion bias_activation_fusion no_bias_swiglu_fusion bias_dropout_fusion no_bias_dropout_fusion
        masked_softmax_fusion no_masked_softmax_fusion gradient_accumulation_fusion no_gradient_accumulation_fusion
        use_logits_to_keep experts_impl moe_grouped_gemm moe_permute_fusion overlap_grad_reduce overlap_param_gather tf32
        use_precision_aware_optimizer""",
    "mswift arranges the loading of data by itself": """dataloader_pin_memory dataloader_prefetch_factor
        dataloader_persistent_workers dataloader_type load_from_cache_file lazy_tokenize packing_num_proc remove_unused_columns""",
    "mswift loads and saves in its own way": """no_initialization perform_initialization use_cpu_initialization ckpt_format auto_detect_ckpt_format
        dist_ckpt_optim_fully_reshardable save_only_model no_save_optim no_save_rng async_save exit_on_missing_checkpoint
        gradient_checkpointing_kwargs""",
    "throughput and memory are always logged": "log_throughput tensorboard_log_interval logging_dir tensorboard_dir disable_tqdm log_level",
    "batches are set by --micro_batch_size": "max_batch_size eval_accumulation_steps",
    "garbage collection is left to Python": "manual_gc manual_gc_steps manual_gc_interval manual_gc_eval",
    "there is no image or video encoder to freeze": "freeze_llm freeze_vit freeze_aligner vit_gradient_checkpointing vit_use_gc vit_attn_impl",
}
NO_EFFECT: dict[str, str] = {name: reason for reason, names in _NO_EFFECT.items() for name in names.split()}
"""Flag of ms-swift -> why it changes nothing here."""

HINTS: dict[str, str] = {
    "deepspeed": "the optimizer state is spread over processes with --use_distributed_optimizer true",
    "fsdp": "the optimizer state is spread over processes with --use_distributed_optimizer true",
    "finetune": "to go on with a run use --resume_from_checkpoint auto",
    "train_dataset_sample": "write --dataset NAME#N",
    "self_cognition_sample": "write --dataset NAME#N",
    "num_layers_per_virtual_pipeline_stage": "give --virtual_pipeline_model_parallel_size",
    "config": "give the file as the first argument",
}
"""Flag that is not supported -> what to do instead."""

VALUES: dict[str, dict[str, Any]] = {
    "torch_dtype": {"bf16": "bfloat16", "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "auto": None}
    | {f"torch.{name}": name for name in ("bfloat16", "float32", "float16")},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "truncation_strategy": {"truncation_left": "left"},
    "max_steps": {"-1": None},
    "save_total_limit": {"0": None, "-1": None},
    "target_modules": {"all": "all-linear", "ALL": "all-linear"},
}
"""Flag -> old value -> its name now; None for "not set"."""

UNSUPPORTED_VALUES: dict[str, frozenset[str]] = {
    name: frozenset(values.split())
    for name, values in {
        "torch_dtype": "float16",
        "tuner_type": "longlora adalora llamapro adapter vera boft fourierft reft bone ia3 lora_llm dummy",
        "report_to": "wandb swanlab all mlflow comet_ml clearml trackio",
        "lr_scheduler_type": "cosine_with_restarts polynomial inverse_sqrt reduce_lr_on_plateau cosine_with_min_lr warmup_stable_decay WSD "
        "inverse-square-root",
        "device": "npu mps xpu",
        "template_mode": "kto",
        "quant_method": "hqq eetq quanto fp8 awq gptq aqlm gptq_v2",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "float16",
        "ddp_backend": "mpi ccl hccl",
    }.items()
}
"""Flag -> values that ms-swift knows and mswift does not, yet."""
