"""Answers equal those of transformers token for token; batches and the reuse of the cache do not change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mswift.errors import DataError, MswiftError
from mswift.rollout.generate import Answer, Generator
from mswift.rollout.sampling import Sampling
from mswift.rollout.settings import GenerationSettings
from tests.parity.cases import options_of
from tests.tiny import make_checkpoint, make_model, make_peft_adapter

GREEDY = GenerationSettings(max_new_tokens=20)
HOT = GenerationSettings(Sampling(temperature=1.3, top_k=80, top_p=0.98), max_new_tokens=12)
NO_END = 331  # no token has this id


def reference(model: Any, prompt: Sequence[int], count: int = 20, **options: Any) -> list[int]:
    """What transformers answers with the likeliest token."""
    ids = torch.tensor([prompt])
    common = {"do_sample": False, "max_new_tokens": count, "eos_token_id": NO_END, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **common, **options)
    return out[0, len(prompt) :].tolist()


def ids_of(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize(
    "case",
    [
        *("llama/plain", "qwen2/plain", "qwen3/plain", "gemma2/plain", "gemma3_text/scaled", "cohere2/plain", "cohere/head-norms", "olmo3/plain"),
        *("ministral3/plain", "phi3/longrope-short", "phi3/longrope-long", "smollm3/plain", "starcoder2/plain", "glm4/plain", "granite/plain"),
        *("mixtral/windows", "qwen2_moe/normalised-some-dense", "qwen3_next/not-normalised-some-dense", "qwen3_5_text/plain"),
        *("deepseek_v3/plain", "deepseek_v3/no-narrow-queries", "deepseek_v2/lite", "llama4_text/plain", "llama4_text/dense"),
    ],
)
def test_greedy_answers_equal_those_of_transformers(
    case: str, load: Callable[..., Any], tokenizer: Any, tmp_path: Path, prompts: list[list[int]]
) -> None:
    kind, changes = options_of(case)
    if kind.startswith(("gemma", "cohere")):  # tied and random, they say one token again and again
        changes = {**changes, "tie_word_embeddings": False}
    if case == "phi3/longrope-long":  # shorter than every prompt
        changes = {"rope_parameters": {**changes["rope_parameters"], "original_max_position_embeddings": 3}, "original_max_position_embeddings": 3}
    directory = make_checkpoint(tmp_path / kind, kind, seed=3, **changes)
    generator = Generator(load(directory), tokenizer)
    model = make_model(kind, seed=3, **changes)
    expected = [reference(model, prompt) for prompt in prompts]
    assert [generator.generate([prompt], GREEDY)[0].token_ids for prompt in prompts] == expected
    assert ids_of(generator.generate(prompts, GREEDY)) == expected, "padded on the left"
    assert len({token for answer in expected for token in answer}) > 15, "the answers hardly differ, so nothing was compared"


def test_answers_with_an_adapter_of_peft_equal_those_of_peft(
    load: Callable[..., Any], checkpoint: Path, tokenizer: Any, tmp_path: Path, prompts: list[list[int]]
) -> None:
    from peft import PeftModel

    base = [reference(make_model(), prompt) for prompt in prompts]
    make_peft_adapter(checkpoint, tmp_path / "adapter", r=3)
    model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    expected = [reference(model, prompt) for prompt in prompts]
    generator = Generator(load(checkpoint, tmp_path / "adapter"), tokenizer)
    assert ids_of(generator.generate(prompts, GREEDY)) == expected
    assert generator.generate(prompts[:1], GREEDY)[0].token_ids == expected[0]
    assert expected != base


def test_sliding_windows_are_kept_while_decoding(load: Callable[..., Any], tokenizer: Any, tmp_path: Path, prompts: list[list[int]]) -> None:
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    directory = make_checkpoint(tmp_path / "model", "qwen3", seed=4, **window)
    generator = Generator(load(directory), tokenizer)
    expected = [reference(make_model("qwen3", seed=4, **window), prompt) for prompt in prompts]
    assert ids_of(generator.generate(prompts, GREEDY)) == expected
    assert expected != [reference(make_model("qwen3", seed=4), prompt) for prompt in prompts]


def test_the_repetition_penalty_is_that_of_transformers(generator: Generator, prompts: list[list[int]]) -> None:
    settings = replace(GREEDY, sampling=Sampling(repetition_penalty=1.4))
    expected = [reference(make_model(), prompt, repetition_penalty=1.4) for prompt in prompts]
    assert ids_of(generator.generate(prompts, settings)) == expected
    assert expected != ids_of(generator.generate(prompts, GREEDY))


def test_seeds_reproduce_answers_alone_and_in_a_batch(generator: Generator, prompts: list[list[int]]) -> None:
    first = ids_of(generator.generate(prompts, HOT, seeds=[4, 5, 6]))
    assert ids_of(generator.generate(prompts, HOT, seeds=[4, 5, 6])) == first
    assert [generator.generate([prompt], HOT, seeds=[seed])[0].token_ids for prompt, seed in zip(prompts, [4, 5, 6])] == first
    assert ids_of(generator.generate(prompts, HOT, seeds=[7, 8, 9])) != first
    assert ids_of(generator.generate(prompts, HOT)) != ids_of(generator.generate(prompts, HOT))


def test_the_beginning_of_a_conversation_is_computed_once(generator: Generator, prompts: list[list[int]]) -> None:
    first, second = prompts[1], prompts[0]
    generator.cache.clear()
    answer = generator.generate([first], GREEDY)[0].token_ids
    again = [*first, *answer, *second]
    generator.cache.clear()
    expected = generator.generate([again], GREEDY)[0].token_ids
    generator.cache.clear()
    generator.generate([first], GREEDY)
    assert generator.cache.begin([again], None) == len(first) + len(answer) - 1, "the last token of an answer has not been computed"
    assert generator.generate([again], GREEDY)[0].token_ids == expected
    assert generator.generate([again], GREEDY)[0].token_ids == expected, "the whole prompt is there: its last token is computed again"
    changed = [*first[:5], 99, *first[6:]]
    fresh = [reference(make_model(), changed)]
    assert ids_of(generator.generate([changed], GREEDY)) == fresh
    assert generator.cache.tokens is not None
    assert generator.cache.tokens[: len(changed)] == changed


def test_a_state_goes_on_with_the_conversation_and_never_back(
    load: Callable[..., Any], tokenizer: Any, tmp_path: Path, prompts: list[list[int]]
) -> None:
    generator = Generator(load(make_checkpoint(tmp_path / "model", "qwen3_5_text", seed=3)), tokenizer)
    model = make_model("qwen3_5_text", seed=3)
    first = prompts[1]
    answer = generator.generate([first], GREEDY)[0].token_ids
    again = [*first, *answer, *prompts[0]]
    assert generator.cache.begin([again], None) == len(first) + len(answer) - 1
    assert generator.generate([again], GREEDY)[0].token_ids == reference(model, again)
    shorter = again[:-2]
    assert generator.cache.begin([shorter], None) == 0, "what was computed is not its beginning"
    assert generator.generate([shorter], GREEDY)[0].token_ids == reference(model, shorter)
    stream = generator.stream([first], GREEDY)
    next(stream)
    stream.close()
    assert generator.generate([first], GREEDY)[0].token_ids == answer


def test_rows_with_a_state_leave_the_batch(load: Callable[..., Any], tokenizer: Any, tmp_path: Path, prompts: list[list[int]]) -> None:
    generator = Generator(load(make_checkpoint(tmp_path / "model", "qwen3_5_text", seed=3)), tokenizer)
    whole = ids_of(generator.generate(prompts, GREEDY))
    ends = (whole[0][3], whole[2][8])
    expected = [next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids) for ids in whole]
    assert ids_of(generator.generate(prompts, replace(GREEDY, stop_token_ids=ends))) == expected
    assert min(map(len, expected)) < max(map(len, expected))


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text"])
def test_the_cache_grows_while_an_answer_does(kind: str, load: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    kinds = {} if kind == "llama" else {"layer_types": ["full_attention", "linear_attention"]}
    changes = {"max_position_embeddings": 700, "num_hidden_layers": len(kinds.get("layer_types", "x")), **kinds}
    directory = make_checkpoint(tmp_path / "model", kind, seed=1, **changes)
    generator = Generator(load(directory), tokenizer)
    prompt = list(range(3, 243))
    capacities = []
    for pieces in generator.stream([prompt], replace(GREEDY, max_new_tokens=300)):
        capacities.append(generator.cache.context.max_sequence_length)
        answer = pieces[0].answer
    assert answer is not None
    assert answer.token_ids == reference(make_model(kind, seed=1, **changes), prompt, 300)
    assert (capacities[0], capacities[-1]) == (512, 768)


def test_an_answer_ends_at_an_end_token_a_stop_word_or_the_length(generator: Generator, tokenizer: Any, prompts: list[list[int]]) -> None:
    (whole,) = generator.generate(prompts[:1], GREEDY)
    assert (whole.finish_reason, len(whole.token_ids), whole.num_prompt_tokens) == ("length", 20, 9)
    (ended,) = generator.generate(prompts[:1], replace(GREEDY, stop_token_ids=(NO_END, whole.token_ids[6])))
    assert (ended.finish_reason, ended.token_ids) == ("stop", whole.token_ids[: whole.token_ids.index(whole.token_ids[6]) + 1])
    assert ended.text == tokenizer.decode(ended.token_ids[:-1], skip_special_tokens=True)
    word = whole.text[4:7]
    (stopped,) = generator.generate(prompts[:1], replace(GREEDY, stop_words=(word,)))
    assert (stopped.finish_reason, stopped.text) == ("stop", whole.text[: whole.text.index(word)])
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    (short,) = generator.generate(prompts[:1], replace(GREEDY, max_new_tokens=1))
    assert (short.finish_reason, short.token_ids) == ("length", whole.token_ids[:1])


def test_rows_that_end_early_leave_the_batch(generator: Generator, prompts: list[list[int]]) -> None:
    whole = generator.generate(prompts, GREEDY)
    ends = (whole[0].token_ids[3], whole[2].token_ids[8])
    settings = replace(GREEDY, stop_token_ids=ends)
    expected = [next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids) for ids in ids_of(whole)]
    sizes, texts = [], ["", "", ""]
    for pieces in generator.stream(prompts, settings):
        sizes.append(len(pieces))
        for piece in pieces:
            texts[piece.row] += piece.text
    answers = generator.generate(prompts, settings)
    assert ids_of(answers) == expected
    assert texts == [answer.text for answer in answers]
    assert sizes[0] == 3
    assert sizes[-1] < 3


def test_a_model_of_limited_length_stops_there(generator: Generator, load: Callable[..., Any], prompts: list[list[int]], tokenizer: Any) -> None:
    short = Generator(generator.model, tokenizer, max_length=20)
    answers = short.generate(prompts, GREEDY)
    assert [len(answer.token_ids) for answer in answers] == [11, 3, 16]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert ids_of(answers) == [ids[:room] for ids, room in zip(ids_of(generator.generate(prompts, GREEDY)), [11, 3, 16])]
    with pytest.raises(DataError, match="the prompt has 20 tokens and the longest sequence is 20"):
        short.generate([[5] * 20], GREEDY)
    with pytest.raises(DataError, match="no tokens"):
        short.generate([[]], GREEDY)


def test_padding_of_the_vocabulary_is_never_drawn(generator: Generator, prompts: list[list[int]]) -> None:
    padded, real = generator.model.chunks[0].output_weight().shape[0], generator.model.description.vocab_size
    assert padded > real
    flat = GenerationSettings(Sampling(temperature=1e6), max_new_tokens=200)
    drawn = [token for answer in generator.generate(prompts, flat, seeds=[1, 2, 3]) for token in answer.token_ids]
    assert max(drawn) < real
    assert len(set(drawn)) > real // 2, "draws from nearly equal probabilities reach nearly all tokens"


def test_a_stream_may_be_left_and_the_model_trained_afterwards(load: Callable[..., Any], checkpoint: Path, tokenizer: Any) -> None:
    model = load(checkpoint)
    model.chunks[0].train()
    generator = Generator(model, tokenizer)
    stream = generator.stream([[5, 6, 7]], GREEDY)
    next(stream)
    assert not model.chunks[0].training
    stream.close()
    assert model.chunks[0].training
    capacity = generator.cache.context.max_sequence_length
    ids = torch.arange(3, 3 + capacity % 256 + 256)[None] % 331
    assert ids.shape[1] == capacity, "the rotary table that generation made is used"
    log_probs = model.chunks[0](ids, torch.arange(capacity)[None], None, labels=ids)
    log_probs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.chunks[0].parameters())
    assert generator.generate([[5, 6, 7]], GREEDY)[0].token_ids == reference(make_model(), [5, 6, 7])


def test_bfloat16_answers_are_reproducible(load: Callable[..., Any], checkpoint: Path, tokenizer: Any, prompts: list[list[int]]) -> None:
    generator = Generator(load(checkpoint, dtype="bfloat16"), tokenizer)
    answers = ids_of(generator.generate(prompts, GREEDY))
    assert ids_of(generator.generate(prompts, GREEDY)) == answers
    assert generator.cache.context.key_value_memory_dict[1][0].dtype == torch.bfloat16


def test_sequence_parallel_models_are_refused(generator: Generator, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(generator.model.config, "sequence_parallel", True)
    with pytest.raises(MswiftError, match="sequence_parallel false") as caught:
        Generator(generator.model, tokenizer)
    assert "\n" not in str(caught.value)
