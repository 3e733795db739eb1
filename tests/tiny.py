"""Tiny real checkpoints for tests: unequal dimensions and every tensor random, norms and biases too, so that a swap or a skip shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "who are you",
    "I am a tiny model with very few words",
    "what is two plus two",
    "it is four, of course",
    "the swift is a bird that hardly ever lands",
    "tell me more about birds and models",
)
DIMENSIONS: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
WITHOUT_HEAD_DIM = ("qwen2", "phi3", "olmoe")
"""Families whose heads are as wide as the hidden size over their number."""

DELTA_NETS = ("qwen3_next", "qwen3_5")
"""Families that have gated delta nets beside attention."""
DELTA_NET = {
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rms_norm_eps": 1e-2,  # a head that remembers little puts out nearly nothing, and its norm would make rounding as large as the rest
}


def config_of(kind: str, **changes: Any) -> Any:
    """A tiny transformers config of a family (its ``model_type``)."""
    from transformers import AutoConfig

    dimensions = {**DIMENSIONS, **(DELTA_NET if kind.startswith(DELTA_NETS) else {}), **changes}
    if kind in WITHOUT_HEAD_DIM:
        dimensions = {**dimensions, "hidden_size": dimensions["num_attention_heads"] * dimensions.pop("head_dim")}
    return AutoConfig.for_model(kind, **dimensions)


def make_model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A transformers model of that config with every tensor random."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of(kind, **changes), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                zero_centred = kind.startswith(DELTA_NETS) and not name.endswith("linear_attn.norm.weight")
                parameter.uniform_(-0.5 if zero_centred else 0.5, 0.5 if zero_centred else 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
            parameter.data = parameter.data.to(dtype)  # not model.to(): it rounds the rotary frequencies too, which no loaded model does
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def make_tokenizer(directory: Path, vocab_size: int = DIMENSIONS["vocab_size"]) -> None:
    """A real byte-level BPE tokenizer with a ChatML template, written as transformers writes one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    fast.chat_template = CHATML
    fast.save_pretrained(directory)


def make_checkpoint(directory: Path, kind: str = "llama", **options: Any) -> Path:
    """A complete Hugging Face directory: weights, config, tokenizer, chat template."""
    make_model(kind, **options).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def as_pickle(directory: Path) -> Path:
    """The same checkpoint with its weights in pytorch_model.bin, as torch saves a state_dict: a tied head under both of its names."""
    from transformers import AutoModelForCausalLM

    torch.save(AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict(), directory / "pytorch_model.bin")
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    return directory


def make_peft_adapter(base: Path, directory: Path, *, seed: int = 1, std: float = 0.2, **options: Any) -> Path:
    """An adapter by peft for the checkpoint in `base`, with every A and B random, so that the modules of a fused layer share nothing.

    Args:
        options: of LoraConfig; rank 4, alpha 6 and all linear layers without them.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3, generator=generator))
            elif "lora_" in name:
                parameter.normal_(0.0, std, generator=generator)
    model.save_pretrained(directory)
    return directory


def write_rows(path: Path, count: int = 24) -> Path:
    """Conversations of unequal length over the tokenizer's corpus."""
    rows = []
    for i in range(count):
        question, answer = CORPUS[i % len(CORPUS)], " ".join(CORPUS[(i + j) % len(CORPUS)] for j in range(1 + i % 3))
        rows.append({"messages": [{"role": "user", "content": f"{question} {i}"}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path
