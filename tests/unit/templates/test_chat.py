"""Chat templates of public models: the ids of `apply_chat_template`, a mask on what the assistant writes, rows that begin where prompts end."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mswift.errors import DataError
from mswift.templates import ChatTemplate, Encoded, parse_loss_scale

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
ONE_ROW = ["smollm2", "llama3", "qwen2_5", "gemma", "llama2", "phi4_mini", "generation", "generation_content"]
KINDS = ["byte_level", "split_byte_level", "metaspace"]

contents = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            "\n\nParis",
            " lead",
            "trail ",
            "a\n",
            "é",
            "e\u0301",
            "你好。",
            "🙂🙃",
            "<|im_end|>",
            "<|im_start|>user\n",
            "<eos>",
            "</s> x",
            "1234",
        ]
    ),
    st.text(max_size=30),
)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(contents)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
    return messages


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


def runs(row: Encoded) -> list[tuple[int, int]]:
    """Where trained tokens begin and end."""
    weights = [0.0, *row.weights, 0.0]
    edges = [i - 1 for i in range(1, len(weights)) if weights[i] != weights[i - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def trained_text(tokenizer: Any, row: Encoded) -> str:
    return tokenizer.decode([token for token, weight in zip(row.input_ids, row.weights, strict=True) if weight])


def same_ids(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ONE_ROW)
def test_ids_equal_apply_chat_template_and_every_row_begins_where_its_prompt_ends(make_tokenizer: MakeTokenizer, name: str, kind: str) -> None:
    tokenizer = make_tokenizer(name, kind)
    template = ChatTemplate(tokenizer)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations(system=name != "gemma"))
    def check(messages: list[dict[str, str]]) -> None:
        row = template.encode(messages)
        assert row.input_ids == same_ids(tokenizer, messages)
        assert len(row.weights) == len(row.input_ids)
        assert set(row.weights) == {0.0, 1.0}
        prompts = [template.encode_prompt(messages[:i]) for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert prompts[-1] == same_ids(tokenizer, messages[:-1], add_generation_prompt=True)
        begins = [(made.input_ids, run) for made in template.encode_rows(messages) for run in runs(made)]
        assert len(begins) == len(prompts)
        for (ids, (start, stop)), prompt in zip(begins, prompts, strict=True):
            assert ids[:start] == prompt
            assert ids[stop - 1] in template.stop_token_ids

    check()


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "generation", "generation_content", "phi4_mini"])
def test_the_mask_covers_the_answers_and_their_end_of_turn_only(make_tokenizer: MakeTokenizer, name: str) -> None:
    tokenizer = make_tokenizer(name, "byte_level")
    template = ChatTemplate(tokenizer)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def check(messages: list[dict[str, str]]) -> None:
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        rows = template.encode_rows(messages)
        assert "".join(trained_text(tokenizer, row) for row in rows) == "".join(answer + template.end_of_turn for answer in answers)
        assert sum(len(runs(row)) for row in rows) == len(answers)

    check()


def test_the_newline_after_the_end_of_turn_is_not_trained(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("smollm2")
    row = ChatTemplate(tokenizer).encode(chat("Hi", "Hello"))
    assert tokenizer.convert_ids_to_tokens(row.input_ids[-2:]) == ["<|im_end|>", "Ċ"]
    assert row.weights[-2:] == [1.0, 0.0]
    assert trained_text(tokenizer, row) == "Hello<|im_end|>"


def test_the_default_system_prompt_of_the_template_stays_and_ours_replaces_it(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("smollm2")
    messages = chat("Hi", "Hello")
    assert "named SmolLM" in tokenizer.decode(ChatTemplate(tokenizer).encode(messages).input_ids)
    ours = tokenizer.decode(ChatTemplate(tokenizer, system="Be short.").encode(messages).input_ids)
    assert ours.startswith("<|im_start|>system\nBe short.<|im_end|>")
    assert "SmolLM" not in ours
    empty = ChatTemplate(tokenizer, system="")
    assert tokenizer.decode(empty.encode_prompt(messages[:1])).startswith("<|im_start|>system\n<|im_end|>")
    own = [{"role": "system", "content": "Mine."}, *messages]
    assert ChatTemplate(tokenizer, system="Be short.").encode(own).input_ids == same_ids(tokenizer, own)


def test_a_bos_that_the_tokenizer_adds_by_itself_comes_once(make_tokenizer: MakeTokenizer) -> None:
    for name, kind in (("llama3", "split_byte_level"), ("llama2", "metaspace"), ("gemma", "metaspace")):
        tokenizer = make_tokenizer(name, kind)
        assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        row = ChatTemplate(tokenizer).encode(chat("Hi", "Hello"))
        assert row.input_ids.count(tokenizer.bos_token_id) == 1
        assert row.weights[0] == 0.0


def test_stop_tokens_are_eos_and_the_end_of_turn(make_tokenizer: MakeTokenizer) -> None:
    for name, expected in (
        ("smollm2", ["<|im_end|>"]),
        ("llama3", ["<|end_of_text|>", "<|eot_id|>"]),
        ("qwen2_5", ["<|endoftext|>", "<|im_end|>"]),
        ("gemma", ["<eos>", "<end_of_turn>"]),
        ("llama2", ["</s>"]),
        ("phi4_mini", ["<|endoftext|>", "<|end|>"]),
    ):
        template = ChatTemplate(make_tokenizer(name))
        assert template.tokenizer.convert_ids_to_tokens(template.stop_token_ids) == expected
        assert template.end_of_turn.strip() == expected[-1]


def test_content_that_merges_with_the_prompt_is_tokenised_apart_in_training_rows(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("qwen2_5", "split_byte_level")
    template = ChatTemplate(tokenizer)
    messages = chat("Hi", "\nHello", "More", "Yes")
    whole = template.encode(messages)
    assert whole.input_ids == same_ids(tokenizer, messages)
    assert trained_text(tokenizer, whole) == "Hello<|im_end|>Yes<|im_end|>"  # the token "\n\n" belongs to the prompt
    rows = template.encode_rows(messages)
    assert [trained_text(tokenizer, row) for row in rows] == ["\nHello<|im_end|>", "Yes<|im_end|>"]
    assert rows[0].input_ids[: runs(rows[0])[0][0]] == template.encode_prompt(messages[:1])
    assert rows[1].input_ids[: runs(rows[1])[0][0]] == template.encode_prompt(messages[:3])


# ---- templates that rewrite earlier turns


def test_a_thinking_template_trains_each_turn_on_the_prompt_it_is_served_with(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("qwen3", "split_byte_level")
    template = ChatTemplate(tokenizer)
    messages = chat("One?", "<think>\nfirst\n</think>\n\n1", "Two?", "<think>\nsecond\n</think>\n\n2")
    rows = template.encode_rows(messages)
    assert [row.input_ids for row in rows] == [same_ids(tokenizer, messages[:2]), same_ids(tokenizer, messages)]
    assert [trained_text(tokenizer, row) for row in rows] == [
        "<think>\nfirst\n</think>\n\n1<|im_end|>",
        "<think>\nsecond\n</think>\n\n2<|im_end|>",
    ]
    assert "first" not in tokenizer.decode(rows[1].input_ids)
    assert all(row.input_ids[: runs(row)[0][0]] == template.encode_prompt(messages[:end]) for row, end in zip(rows, (1, 3), strict=True))
    with pytest.raises(
        DataError, match=r"^the chat template rewrites earlier turns, so one row cannot hold .*'<think>.*; encode it with encode_rows$"
    ):
        template.encode(messages)


def test_a_thinking_template_holds_one_turn_or_the_last_round_in_one_row(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("qwen3")
    one = chat("One?", "<think>\nfirst\n</think>\n\n1")
    assert ChatTemplate(tokenizer).encode(one).input_ids == same_ids(tokenizer, one)
    two = one + chat("Two?", "2")
    rows = ChatTemplate(tokenizer, loss_scale="last_round").encode_rows(two)
    assert len(rows) == 1
    assert rows[0].input_ids == same_ids(tokenizer, two)
    assert trained_text(tokenizer, rows[0]) == "<think>\n\n</think>\n\n2<|im_end|>"


def test_thinking_switched_off_opens_and_closes_it_in_the_prompt(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("qwen3")
    template = ChatTemplate(tokenizer, enable_thinking=False)
    rows = template.encode_rows(chat("One?", "1", "Two?", "2"))
    assert [trained_text(tokenizer, row) for row in rows] == ["1<|im_end|>", "2<|im_end|>"]
    assert tokenizer.decode(template.encode_prompt(chat("One?"))).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(DataError, match=r"does not begin where its served prompt ends: after .*; check enable_thinking against the rows$"):
        template.encode_rows(chat("One?", "<think>\nwhy\n</think>\n\n1"))


def test_a_prompt_that_opens_the_reasoning_is_continued_by_the_content(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("r1_distill")
    template = ChatTemplate(tokenizer)
    messages = chat("One?", "<think>\nfirst\n</think>\n\n1", "Two?", "<think>\nsecond\n</think>\n\n2")
    rows = template.encode_rows(messages)
    assert [trained_text(tokenizer, row) for row in rows] == [
        "first\n</think>\n\n1<｜end▁of▁sentence｜>",
        "second\n</think>\n\n2<｜end▁of▁sentence｜>",
    ]
    assert [row.input_ids[: runs(row)[0][0]] for row in rows] == [template.encode_prompt(messages[:1]), template.encode_prompt(messages[:3])]
    assert "first" not in tokenizer.decode(rows[1].input_ids)
    with pytest.raises(DataError, match=r"begin every assistant content with '<think>\\n', which the model's prompt opens$"):
        ChatTemplate(tokenizer, add_non_thinking_prefix=False).encode_rows(chat("One?", "1"))
    (row,) = template.encode_rows(chat("One?", "1"))
    assert trained_text(tokenizer, row) == "\n</think>\n\n1<｜end▁of▁sentence｜>"


# ---- which turns are trained


@pytest.mark.parametrize("name", ["smollm2", "generation"])
def test_loss_scales_and_loss_of_single_messages(make_tokenizer: MakeTokenizer, name: str) -> None:
    tokenizer = make_tokenizer(name)
    messages: list[dict[str, Any]] = chat("a", "first", "b", "second")
    assert trained_text(tokenizer, ChatTemplate(tokenizer).encode(messages)) == "first<|im_end|>second<|im_end|>"
    assert trained_text(tokenizer, ChatTemplate(tokenizer, loss_scale="last_round").encode(messages)) == "second<|im_end|>"
    everything = ChatTemplate(tokenizer, loss_scale="all").encode(messages)
    assert everything.weights == [1.0] * len(everything.input_ids)
    assert everything.input_ids == same_ids(tokenizer, messages)
    messages[3]["loss"] = False
    assert trained_text(tokenizer, ChatTemplate(tokenizer).encode(messages)) == "first<|im_end|>"
    with pytest.raises(DataError, match=r"^no assistant turn to train on; every training row needs one$"):
        ChatTemplate(tokenizer, loss_scale="last_round").encode(messages)


def test_generation_blocks_agree_with_the_mask_of_transformers(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("generation")
    messages = chat("One?", " first", "Two?", "second")
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    row = ChatTemplate(tokenizer).encode(messages)
    assert row.weights == [float(mask) for mask in out["assistant_masks"]]
    assert row.input_ids == out["input_ids"]
    content_only = ChatTemplate(make_tokenizer("generation_content")).encode(messages)
    assert content_only.weights == row.weights  # the end-of-turn token is taken in
    empty = ChatTemplate(make_tokenizer("generation_content")).encode(chat("One?", ""))
    assert trained_text(tokenizer, empty) == "<|im_end|>"


# ---- what is refused


def test_a_batch_holds_rows_and_errors_in_place(make_tokenizer: MakeTokenizer) -> None:
    template = ChatTemplate(make_tokenizer("gemma"))
    good, refused, no_answer = chat("Hi", "Hello"), chat("Hi", "Hello")[::-1], chat("Hi")
    made = template.encode_batch([good, refused, no_answer, good])
    assert isinstance(made[0], list)
    assert made[0] == made[3] == [template.encode(good)]
    assert str(made[1]) == (
        "the chat template refused a conversation with the roles assistant, user: Conversation roles must alternate user/assistant/user/assistant/"
    )
    assert str(made[2]) == "no assistant turn to train on; every training row needs one"
    assert template.encode_batch([]) == []


def test_a_system_prompt_that_the_template_cannot_take_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DataError) as refused:
        ChatTemplate(make_tokenizer("gemma"), system="Be short.")
    assert str(refused.value) == (
        "--system is set, but the chat template of tiny-gemma takes no system prompt (the chat template refused a conversation with the roles "
        "system, user: System role not supported); leave --system out, or put its text into the first user turn"
    )
    ignoring = "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"takes no system prompt \(it ignores system turns\)"):
        ChatTemplate(make_tokenizer("smollm2"), system="Be short.", chat_template=ignoring)
    template = ChatTemplate(make_tokenizer("smollm2"), chat_template=ignoring)
    with pytest.raises(DataError, match=r"^the chat template of tiny-smollm2 ignores 'system' turns; remove them or fold them into a user turn$"):
        template.encode([{"role": "system", "content": "Be short."}, *chat("Hi", "Hello")])


def test_a_role_that_the_template_leaves_out_is_refused_and_one_it_knows_is_not(make_tokenizer: MakeTokenizer) -> None:
    messages = [*chat("Hi", "Let me look"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42"}]
    with pytest.raises(DataError, match="ignores 'tool' turns"):
        ChatTemplate(make_tokenizer("qwen3")).encode(messages)
    tokenizer = make_tokenizer("qwen2_5")
    row = ChatTemplate(tokenizer).encode(messages)
    assert row.input_ids == same_ids(tokenizer, messages)
    assert trained_text(tokenizer, row) == "Let me look<|im_end|>It is 42<|im_end|>"
    assert trained_text(tokenizer, ChatTemplate(tokenizer, loss_scale="last_round").encode(messages)) == trained_text(tokenizer, row)


def test_a_tokenizer_without_a_chat_template_is_refused(make_tokenizer: MakeTokenizer) -> None:
    bare = pickle.loads(pickle.dumps(make_tokenizer("smollm2")))
    bare.chat_template = None
    with pytest.raises(DataError) as missing:
        ChatTemplate(bare)
    assert str(missing.value) == (
        "tiny-smollm2 has no chat template; take the chat (Instruct) model, give --template NAME (such as chatml), "
        "or put a chat_template.jinja into its directory"
    )
    bare.chat_template = {"one": "x", "two": "y"}
    with pytest.raises(DataError, match=r"^tiny-smollm2: This model has multiple chat templates"):
        ChatTemplate(bare)
    with pytest.raises(DataError, match="the chat template of tiny-smollm2 is broken at line 1"):
        ChatTemplate(bare, chat_template="{% for m in messages %}{{ m.content")
    with pytest.raises(DataError, match="does not write what the assistant says"):
        ChatTemplate(bare, chat_template="always the same")


def test_a_conversation_that_begins_with_the_assistant_has_no_prompt(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(
        DataError, match=r"^messages\[0\] is an assistant turn: nothing would be served before it; drop it or put a user turn in front$"
    ):
        ChatTemplate(make_tokenizer("qwen2_5")).encode(chat("x", "Hello")[1:])


def test_settings_without_effect_are_said(make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("mswift"), "propagate", True)
    ChatTemplate(make_tokenizer("smollm2"), enable_thinking=True)
    assert set(caplog.messages) == {"enable_thinking has no effect: the chat template of tiny-smollm2 does not use it"}
    caplog.clear()
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    template = ChatTemplate(make_tokenizer("smollm2"), chat_template=plain)
    assert set(caplog.messages) == {
        "the chat template of tiny-smollm2 ends an assistant turn without a special token: the model cannot learn to stop"
    }
    assert template.stop_token_ids == [template.tokenizer.eos_token_id]
    assert [trained_text(template.tokenizer, row) for row in template.encode_rows(chat("Hi", "Hello"))] == ["Hello\n"]


def test_a_template_goes_to_another_process_whole(make_tokenizer: MakeTokenizer) -> None:
    template = ChatTemplate(make_tokenizer("qwen3"), system="Be short.", enable_thinking=False)
    copy = pickle.loads(pickle.dumps(template))
    messages = chat("One?", "1", "Two?", "2")
    assert copy.encode_rows(messages) == template.encode_rows(messages)
    assert copy.stop_token_ids == template.stop_token_ids
    assert (copy.system, copy.loss_scale) == ("Be short.", parse_loss_scale("default"))
