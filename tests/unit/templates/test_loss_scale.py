"""Weights of parts of an answer: the strategies of ms-swift, a user's own file, and the tokens that get them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.errors import ConfigError
from mswift.templates import ChatTemplate, Conversation, parse_loss_scale
from mswift.templates.loss_scale import STRATEGIES
from tests.unit.templates.registry import assistant, tokenizer_for, user

REACT = "Thought: look it up\nAction: search\nAction Input: {}\nObservation: found\nThought: done\nFinal Answer: 42"


def weights(text: str, answer: str, query: str = "") -> list[tuple[str, float]]:
    return [(answer[start:end], weight) for start, end, weight in parse_loss_scale(text).weigh(answer, query)]


def test_texts_weigh_themselves_and_what_follows() -> None:
    assert weights("react", REACT) == [
        ("Thought: look it up\n", 1.0),
        ("Action: search\nAction Input: {}\nObservation:", 2.0),
        (" found\n", 0.0),
        ("Thought: done\nFinal Answer: 42", 1.0),
    ]
    assert weights("alpha_umi", "Next: go") == [("Next: go", 2.0)]
    assert weights("qwen", "✿FUNCTION✿: f\n✿RESULT✿: 3\n✿RETURN✿: ok") == [
        ("✿FUNCTION✿: f\n✿RESULT✿:", 2.0),
        (" 3\n", 0.0),
        ("✿RETURN✿: ok", 1.0),
    ]


def test_expressions_weigh_what_they_match_and_a_query_the_whole_answer() -> None:
    call = "<tool_call>\n{}\n</tool_call>"
    assert weights("hermes", f"I look.\n{call}\n{call}.") == [("I look.\n", 1.0), (call, 2.0), ("\n", 1.0), (call, 2.0), (".", 1.0)]
    assert weights("ignore_empty_think", "<think>\n\n</think>\n\nYes <think></think>") == [
        ("<think>\n\n</think>\n\n", 0.0),
        ("Yes <think></think>", 1.0),
    ]
    assert weights("ignore_think_prefix", "<think>\nso") == [("<think>\n", 0.0), ("so", 1.0)]
    assert weights("agentflan", "Name: f", "Please: What is the value of x?") == [("Name: f", 3.0)]
    assert weights("agentflan", "Name: f", "Hi") == [("Name:", 1.0), (" f", 3.0)]


def test_strategies_are_multiplied() -> None:
    answer = "<think></think><tool_call>x</tool_call>"
    assert weights("last_round+hermes+ignore_empty_think", answer) == [("<think></think>", 0.0), ("<tool_call>x</tool_call>", 2.0)]
    assert parse_loss_scale("last_round+hermes").base == "last_round"
    assert parse_loss_scale("hermes").base == "default"
    assert [parse_loss_scale(base).strategies for base in ("default", "last_round", "all")] == [(), (), ()]


@given(st.text(max_size=60), st.sampled_from(["default", "+".join(STRATEGIES), *STRATEGIES]))
def test_spans_cover_the_answer_once(answer: str, text: str) -> None:
    spans = parse_loss_scale(text).weigh(answer, "")
    assert "".join(answer[start:end] for start, end, _ in spans) == answer
    assert all(weight >= 0 for _, _, weight in spans)
    assert [end for _, end, _ in spans[:-1]] == [start for start, _, _ in spans[1:]]


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"[0-9]+": [0.5]}))
    assert weights(f"last_round+{path}", "a 12") == [("a ", 1.0), ("12", 0.5)]
    assert weights(f"default+{path}+ignore_empty_think", "a 12") == [("a ", 1.0), ("12", 0.5)]
    for content, fault in (
        ('{"a": [1, 2], "b": [1]}', "mixes texts with two weights and expressions with one"),
        ('{"(": [1]}', r"'\(' is no regular expression"),
        ('{"a": [-1]}', r"'a' has the weights \[-1\], wanted one or two numbers of at least 0"),
        ("[]", "wanted an object such as"),
        ("{", "cannot be read: .*; wanted a JSON object of weights"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=fault):
            parse_loss_scale(str(path))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^--loss_scale: 'herms' is unknown, wanted default, .*; did you mean hermes\?$"):
        parse_loss_scale("last_round+herms")
    with pytest.raises(ConfigError, match=r"last_round has to stand first, such as last_round\+hermes"):
        parse_loss_scale("hermes+last_round")
    with pytest.raises(ConfigError, match="nothing follows the"):
        parse_loss_scale("default+")


def test_tokens_get_the_weight_of_the_part_that_they_begin_in() -> None:
    tokenizer = tokenizer_for("qwen2_5")
    row = ChatTemplate(tokenizer, loss_scale="react").encode([user("?"), assistant(REACT)])
    plain = ChatTemplate(tokenizer).encode([user("?"), assistant(REACT)])
    assert row.input_ids == plain.input_ids
    by_weight = {
        weight: tokenizer.decode(
            [token for token, own, all_ in zip(row.input_ids, row.weights, plain.weights, strict=True) if own == weight and all_]
        )
        for weight in (0.0, 1.0, 2.0)
    }
    assert by_weight[0.0] == " found\n"
    assert by_weight[2.0] == "Action: search\nAction Input: {}\nObservation:"
    assert by_weight[1.0].endswith("Final Answer: 42<|im_end|>")


def test_weights_of_single_messages() -> None:
    tokenizer = tokenizer_for("qwen2_5")
    messages = [user("a"), assistant("one", loss_scale=0.5), user("b"), assistant("two", loss=True), user("c"), assistant("three", loss=False)]
    row = ChatTemplate(tokenizer).encode(messages)
    found = {weight: tokenizer.decode([t for t, w in zip(row.input_ids, row.weights, strict=True) if w == weight]) for weight in (0.5, 1.0)}
    assert found == {0.5: "one<|im_end|>", 1.0: "two<|im_end|>"}
    last = ChatTemplate(tokenizer, loss_scale="last_round").encode(messages)
    assert tokenizer.decode([t for t, w in zip(last.input_ids, last.weights, strict=True) if w]).startswith("one<|im_end|>two") is False
    assert tokenizer.decode([t for t, w in zip(last.input_ids, last.weights, strict=True) if w]) == "two<|im_end|>"
    every = ChatTemplate(tokenizer, loss_scale="all").encode(messages)
    untrained = tokenizer.decode([t for t, w in zip(every.input_ids, every.weights, strict=True) if not w])
    assert untrained == "three<|im_end|>"
    assert every.weights.count(1.0) > len(every.weights) / 2


def test_a_row_may_switch_thinking_for_itself() -> None:
    tokenizer = tokenizer_for("qwen3")
    template = ChatTemplate(tokenizer)
    quiet = template.encode_prompt(Conversation([user("x")], kwargs={"enable_thinking": False}))
    assert tokenizer.decode(quiet).endswith("<think>\n\n</think>\n\n")
    assert not tokenizer.decode(template.encode_prompt([user("x")])).endswith("</think>\n\n")
