"""Every template that mswift ships, over conversations of every kind: what is trained is what transformers renders and what is served."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from mswift.errors import ConfigError, DataError
from mswift.templates import ChatTemplate, Conversation
from mswift.templates.named import find_template, table
from tests.unit.templates.registry import assistant, plain_conversations, tokenizer_for, tool_conversations, user
from tests.unit.templates.test_chat import runs

NAMES = list(table())
WITHOUT_SYSTEM = {"gemma"}
"""Its template refuses system turns."""
OPENED = {"deepseek_r1", "deepseek_r1_distill", "glm4_7", "minimax_m2", "qwq"}
"""The served prompt opens the reasoning, which the rendered turn lacks."""
SYSTEM_MOVES = {"mistral_nemo", "mistral_v3"}
"""The system prompt stands in the last user turn of a prompt, and nowhere once that is answered."""
WITH_TOOLS = {
    *(
        "deepseek_v3_1",
        "glm4",
        "glm4_5",
        "glm4_7",
        "gpt_oss",
        "granite3_3",
        "granite4",
        "kimi_k2",
        "lfm2",
        "llama3_1",
        "llama3_2",
        "minimax_m1",
        "minimax_m2",
    ),
    *("mistral_nemo", "mistral_small", "mistral_v3", "qwen2_5", "qwen3", "qwen3_2507", "qwen3_5", "qwen3_coder", "qwq", "seed_oss"),
}


def apply(name: str, conversation: Conversation, **kwargs: Any) -> list[int]:
    tokenizer = tokenizer_for(name)
    made = tokenizer.apply_chat_template(
        list(conversation.messages), tools=list(conversation.tools) or None, tokenize=True, return_dict=True, **kwargs
    )
    return made["input_ids"]


def conversations(name: str) -> dict[str, Conversation]:
    made = plain_conversations() | (tool_conversations() if name in WITH_TOOLS else {})
    return {title: c for title, c in made.items() if not (name in WITHOUT_SYSTEM and c.messages[0]["role"] == "system")}


def encode(template: ChatTemplate, conversation: Conversation) -> tuple[list[int], str]:
    """The ids of the conversation as one row, or why it is none."""
    try:
        return template.encode(conversation).input_ids, ""
    except DataError as error:
        return [], str(error)


def test_there_are_templates_of_many_public_models() -> None:
    assert len(NAMES) >= 45
    assert {"qwen3", "llama3", "alpaca", "chatml", "deepseek_v3", "glm4_5", "mistral_v3", "gemma3", "gpt_oss", "phi4", "kimi_k2"} <= set(NAMES)
    takes = {name for name in NAMES if (r := ChatTemplate(tokenizer_for(name)).renderer).takes_tools and (r.tool_style or r.dialect) is not None}
    assert takes == WITH_TOOLS


@pytest.mark.parametrize("name", NAMES)
def test_one_row_is_token_for_token_what_transformers_renders(name: str) -> None:
    template = ChatTemplate(tokenizer_for(name), add_non_thinking_prefix=False)
    equal = rewritten = 0
    for title, conversation in conversations(name).items():
        prepared = template.renderer.prepare(conversation)
        ids, refusal = encode(template, conversation)
        if refusal:
            assert "rewrites earlier turns" in refusal or (name in OPENED and "begin every assistant content with" in refusal), title
            rewritten += 1
            continue
        expected = apply(name, prepared)
        if prepared.messages[0]["role"] == "system" and name in SYSTEM_MOVES:
            assert ids[: len(expected)] != expected
            continue
        if name in OPENED and "thinking" in title:
            continue
        assert ids[: len(expected)] == expected, title
        assert [ids[len(expected) :]] == [[]] or ids[len(expected) :] == [template.stop_token_ids[-2]] or name.startswith("glm"), title
        equal += 1
    assert equal + rewritten >= 6
    assert equal >= (0 if name in OPENED else 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_turn_is_trained_once_from_where_its_served_prompt_ends(name: str) -> None:
    tokenizer, template = tokenizer_for(name), ChatTemplate(tokenizer_for(name))
    for title, conversation in conversations(name).items():
        prepared = template.renderer.prepare(conversation)
        turns = [i for i, message in enumerate(prepared.messages) if message["role"] == "assistant"]
        prompts = [apply(name, prepared.upto(i), add_generation_prompt=True) for i in turns]
        begins = sorted(((row.input_ids, run) for row in template.encode_rows(conversation) for run in runs(row)), key=lambda made: made[1][0])
        assert len(begins) == len(prompts), title
        for (ids, (start, stop)), prompt, turn in zip(begins, sorted(prompts, key=len), turns, strict=True):
            assert ids[:start] == prompt, title
            assert ids[stop - 1] in template.stop_token_ids, title
            if name in OPENED or (name in SYSTEM_MOVES and prepared.messages[0]["role"] == "system"):
                continue
            if name == "seed_oss" and any(not m["content"].strip() and "tool_calls" not in m for m in prepared.messages[: turn + 1]):
                continue  # an empty turn is rendered without the line end that its prompt has
            whole = tokenizer.decode(apply(name, prepared.upto(turn + 1)))
            assert tokenizer.decode(ids[: stop - 1]) == whole[: len(tokenizer.decode(ids[: stop - 1]))], title


@pytest.mark.parametrize("name", sorted(OPENED))
def test_reasoning_that_the_prompt_opens_is_closed_where_a_turn_has_none(name: str) -> None:
    tokenizer = tokenizer_for(name)
    template = ChatTemplate(tokenizer)
    (row,) = template.encode_rows(plain_conversations()["one turn"])
    (start, stop) = runs(row)[0]
    assert tokenizer.decode(row.input_ids[:start]).rstrip().endswith("<think>")
    assert tokenizer.decode(row.input_ids[start : stop - 1]).lstrip().startswith("</think>")
    assert "Paris." in tokenizer.decode(row.input_ids[start:stop])
    quiet = ChatTemplate(tokenizer, loss_scale="ignore_empty_think").encode_rows(plain_conversations()["one turn"])[0]
    assert quiet.input_ids == row.input_ids
    assert tokenizer.decode(quiet.input_ids[runs(quiet)[0][0] : stop - 1]).strip() == "Paris."


def test_a_call_that_was_thought_over_goes_on_from_the_reasoning_that_its_prompt_opens() -> None:
    tokenizer = tokenizer_for("qwq")
    conversation = tool_conversations()["call"]
    asked, called = conversation.messages
    (row,) = ChatTemplate(tokenizer).encode_rows(Conversation([asked, {**called, "reasoning": "I look."}], conversation.tools))
    ((start, stop),) = runs(row)
    assert tokenizer.decode(row.input_ids[:start]).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(row.input_ids[start:stop]).startswith('I look.\n</think>\n\n<tool_call>\n{"name": "get_weather"')
    assert tokenizer.decode(row.input_ids[start:stop]).endswith("</tool_call><|im_end|>")


def test_reasoning_that_a_template_leaves_out_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("mswift"), "propagate", True)
    thought = [user("x"), assistant("y", reasoning_content="hm")]
    for name, told in (("qwen2_5", True), ("qwen3", False), ("qwq", False), ("gpt_oss", False)):
        caplog.clear()
        template = ChatTemplate(tokenizer_for(name))
        template.encode_rows([user("x"), assistant("y")])
        template.encode_rows(thought)
        template.encode_rows(thought)
        said = {record.message.split(",")[0] for record in caplog.records}
        assert said == ({"the chat template of tiny-qwen2_5 leaves reasoning_content out"} if told else set())
        assert template.renderer._answers["reasoning"] is told


def test_a_template_that_serves_turns_otherwise_than_it_writes_them_shows_the_difference() -> None:
    text = "{% for m in messages %}<|im_start|>{{ m.role }} {{ messages | length }}: {{ m.content }}<|im_end|>{% endfor %}"
    template = ChatTemplate(tokenizer_for("chatml"), chat_template=text + "{% if add_generation_prompt %}<|im_start|>assistant says: {% endif %}")
    with pytest.raises(DataError) as refused:
        template.encode_rows([user("x"), assistant("y")])
    assert str(refused.value) == (
        "messages[1], an assistant turn, does not begin where its served prompt ends: after '<|im_start|>user ' there is "
        "'1: x<|im_end|><|im_start|>assistant says' in serving and '2: x<|im_end|><|im_start|>assistant 2: y' in the whole; "
        "mend the template, or give another one with --template"
    )


def test_a_turn_without_an_end_of_its_own_is_ended_by_what_opens_the_next() -> None:
    tokenizer = tokenizer_for("glm4_5")
    template = ChatTemplate(tokenizer)
    asked, called = plain_conversations()["one turn"], tool_conversations()["call"]
    assert tokenizer.decode(template.encode(asked).input_ids[-1:]) == "<|user|>"
    assert tokenizer.decode(template.encode(called).input_ids[-1:]) == "<|observation|>"
    assert {"<|user|>", "<|observation|>"} <= set(tokenizer.convert_ids_to_tokens(template.stop_token_ids))
    assert "<|call|>" in tokenizer_for("gpt_oss").convert_ids_to_tokens(ChatTemplate(tokenizer_for("gpt_oss")).stop_token_ids)


def test_a_rewriting_template_needs_as_few_rows_as_there_are_histories() -> None:
    template = ChatTemplate(tokenizer_for("qwen3"))
    assert len(template.encode_rows(plain_conversations()["thinking"])) == 2
    rounds = tool_conversations()["two rounds"]
    thinking = [message | ({"reasoning_content": "I look."} if "tool_calls" in message else {}) for message in rounds.messages]
    rows = template.encode_rows(Conversation(thinking, rounds.tools))
    assert [len(runs(row)) for row in rows] == [2, 2], "the call and its answer are one history, the next question another"
    assert len(template.encode_rows(Conversation(thinking[:4], rounds.tools))) == 1


def test_names_are_found_and_others_refused_with_the_nearest() -> None:
    assert find_template("Qwen2.5").name == "qwen2_5"
    assert find_template("gpt-oss").name == "gpt_oss"
    assert find_template("yi").name == "chatml"
    with pytest.raises(ConfigError, match=r"^--template quen3 is unknown; did you mean qwen3\?"):
        find_template("quen3")
    names = [name for template in table().values() for name in (template.name, *template.aliases)]
    assert len(names) == len(set(names))


def test_a_tokenizer_without_the_tokens_of_a_template_is_refused() -> None:
    with pytest.raises(DataError) as refused:
        find_template("chatml").check(tokenizer_for("llama3"))
    assert str(refused.value) == (
        "--template chatml needs <|im_end|>, <|im_start|>, which the tokenizer of tiny-llama3 does not have; add them to the model, or take a "
        "template without such tokens (alpaca, deepseek, default, llama2, mistral_v1, olmo2, vicuna, zephyr)"
    )
    for name in NAMES:
        find_template(name).check(tokenizer_for(name))
    bare = tokenizer_for("phi4_mini", "split_byte_level")
    find_template("alpaca").check(bare)
    bare.eos_token = None
    with pytest.raises(DataError, match="needs an eos_token"):
        find_template("alpaca").check(bare)
