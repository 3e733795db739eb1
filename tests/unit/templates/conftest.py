"""Small real tokenizers and the chat templates of public models, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PUBLIC = Path(__file__).parent / "public"
SENTENCES = [
    "You are a helpful assistant. What is the capital of France? The capital of France is Paris.",
    "system user assistant model tool\n\nHello, how are you?\nI am fine, thank you.\n\n\nassistant:",
    "  two spaces,\ttabs and 1234567890 digits; héllo wörld, 你好,世界。 Привет 🙂",
    "<think>\n\n</think>\n\n[INST] <<SYS>> [/INST] the the that this there then them",
] * 20
SPECIALS = {
    "smollm2": ("<|im_start|>", "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen2_5": (None, "<|endoftext|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "qwen3": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "r1_distill": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    ),
    "gemma": ("<bos>", "<eos>", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
    "llama2": ("<s>", "</s>", ["<unk>", "<s>", "</s>"]),
    "phi4_mini": ("<|endoftext|>", "<|endoftext|>", ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]),
    "generation": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "generation_content": (None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
}
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(specials: list[str]) -> Tokenizer:
    """As SmolLM2 and GPT-2 have it: digits apart, byte level, offsets without leading spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _split_byte_level(specials: list[str]) -> Tokenizer:
    """As Qwen and Llama 3 have it: NFC, a regular expression that keeps newlines together, byte level; a bos that the tokenizer adds by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)])]
    )
    return tokenizer


def _metaspace(specials: list[str]) -> Tokenizer:
    """As Llama 2 and Gemma have it: SentencePiece BPE with bytes to fall back on, a bos that the tokenizer adds by itself."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    first = list(dict.fromkeys(["<unk>", *specials]))
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=first + [f"<0x{i:02X}>" for i in range(256)], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    bos = specials[0] if specials[0] != "<unk>" else specials[1]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, first.index(bos))])
    return tokenizer


KINDS: dict[str, Callable[[list[str]], Tokenizer]] = {"byte_level": _byte_level, "split_byte_level": _split_byte_level, "metaspace": _metaspace}
_made: dict[tuple[str, str], PreTrainedTokenizerFast] = {}


def build_tokenizer(template: str, kind: str = "byte_level") -> PreTrainedTokenizerFast:
    """A tokenizer of the given kind with the special tokens and the chat template of a public model."""
    if (template, kind) not in _made:
        bos, eos, specials = SPECIALS[template]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](specials), bos_token=bos, eos_token=eos, pad_token=eos)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in specials])
        tokenizer.chat_template = (PUBLIC / f"{template}.jinja").read_text(encoding="utf-8")
        tokenizer.name_or_path = f"tiny-{template}"
        _made[template, kind] = tokenizer
    return _made[template, kind]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer
