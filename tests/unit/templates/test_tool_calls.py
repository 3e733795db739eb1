"""Calls that a template writes are read back as they were; calls that do not fit are refused with their place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mswift.errors import ConfigError, DataError
from mswift.templates import ChatTemplate, Conversation
from mswift.templates.dialects import DIALECTS
from mswift.templates.tool_calls import FORMATS, find_format, parse_answer
from mswift.templates.tools import add_ids, check_tools
from tests.unit.templates.registry import WEATHER, answer, assistant, call, tokenizer_for, tool_conversations, user
from tests.unit.templates.test_every_template import WITH_TOOLS

TOOL = {
    "type": "function",
    "function": {
        "name": "look-up.v2",
        "description": "Looks up",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "t"},
                "count": {"type": "integer", "description": "c"},
                "share": {"type": "number", "description": "s"},
                "on": {"type": "boolean", "description": "o"},
                "names": {"type": "array", "items": {"type": "string"}, "description": "n"},
                "more": {"type": "object", "description": "m"},
            },
        },
    },
}
FORMAT_OF = {
    "glm4": "glm4", "granite3_3": "granite", "lfm2": "lfm2", "deepseek_v3_1": "deepseek",
    "glm4_5": "glm", "glm4_7": "glm", "gpt_oss": "harmony", "granite4": "hermes", "kimi_k2": "kimi",
    "llama3_1": "llama3", "llama3_2": "llama3", "minimax_m1": "minimax_m1", "minimax_m2": "minimax_m2", "mistral_nemo": "mistral",
    "mistral_small": "mistral", "mistral_v3": "mistral", "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_2507": "hermes", "qwen3_5": "qwen_coder",
    "qwen3_coder": "qwen_coder", "qwq": "hermes", "seed_oss": "seed",
}  # fmt: skip
_TEXTS = st.text(max_size=20).filter(lambda text: "<" not in text and "\ufdd0" not in text and "\ufdd1" not in text)
arguments = st.fixed_dictionaries(
    {"text": st.one_of(_TEXTS, st.sampled_from(["1", "true", "null", "{}", '"quoted"', "two\nlines", "東京", ""]))},
    optional={
        "count": st.integers(-(10**12), 10**12),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "on": st.booleans(),
        "names": st.lists(_TEXTS, max_size=3),
        "more": st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(st.integers(), _TEXTS), max_size=2),
    },
)


def written(template: ChatTemplate, conversation: Conversation) -> str:
    """What the model has to write for the last turn, without its end."""
    prepared = template.renderer.prepare(conversation)
    plan = template._planner.plan(prepared)[-1]
    start, end, _ = plan.spans[-1]
    text = plan.text[start:end]
    for stop in (template.end_of_turn, *template._turn_end.borrowed.values()):
        text = text.removesuffix(stop) if stop else text
    return text


@pytest.mark.parametrize("name", sorted(WITH_TOOLS))
def test_a_call_that_is_rendered_is_parsed_again(name: str) -> None:
    template = ChatTemplate(tokenizer_for(name))
    form = find_format(template.template_text)
    assert form == FORMAT_OF[name]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(arguments, min_size=1, max_size=1 if template.renderer.takes_one_call else 3))
    def check(several: list[dict[str, Any]]) -> None:
        calls = [call("look-up.v2", **each) for each in several]
        parsed = parse_answer(written(template, Conversation([user("x"), assistant("", tool_calls=calls)], [TOOL])), str(form), [TOOL])
        assert [each["function"] for each in parsed.tool_calls] == [each["function"] for each in calls]
        assert parsed.content.replace("<think>", "").replace("</think>", "").strip() == ""

    check()


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_a_call_of_a_dialect_is_parsed_again_and_the_template_sees_plain_turns(name: str) -> None:
    host = "deepseek_r1" if name == "deepseek_v3" else "chatml"
    template = ChatTemplate(tokenizer_for(host), agent_template=name)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(arguments, min_size=1, max_size=3), st.sampled_from(["", "I look it up."]))
    def check(several: list[dict[str, Any]], said: str) -> None:
        calls = [call("look-up.v2", **each) for each in several]
        conversation = Conversation([user("x"), assistant(said, tool_calls=calls)], [TOOL])
        row = template.encode_rows(conversation)[-1]
        generated = [token for token, weight in zip(row.input_ids, row.weights, strict=True) if weight]
        parsed = template.parse(generated, [TOOL])
        assert [each["function"] for each in parsed.tool_calls] == [each["function"] for each in calls]
        assert parsed.content.replace("</think>", "").strip() == said

    check()
    rounds = tool_conversations()["two rounds"]
    folded = template.renderer.prepare(rounds)
    text = template.render(folded)
    assert "Weather of a city" in text
    assert text.count("noon") == 1
    if host == "chatml":
        assert [message["role"] for message in folded.messages] == ["system", *["user", "assistant"] * 4]
        assert not any(message.get("tool_calls") for message in folded.messages)
        assert not folded.tools
        assert template.renderer.prepare(Conversation([user("x"), assistant("y")])).messages == [user("x"), assistant("y")]


def test_a_template_without_system_turns_gets_the_tools_before_the_first_question() -> None:
    template = ChatTemplate(tokenizer_for("gemma"), agent_template="hermes")
    messages = template.renderer.prepare(tool_conversations()["call"]).messages
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"].startswith("# Tools")
    assert messages[0]["content"].endswith("</tool_call>\n\nWeather in 東京?")


def test_names_of_agent_templates_mean_what_the_template_writes_itself_or_a_dialect() -> None:
    own = ChatTemplate(tokenizer_for("qwen2_5"))
    assert ChatTemplate(tokenizer_for("qwen2_5"), agent_template="hermes").renderer.dialect is None
    other = ChatTemplate(tokenizer_for("qwen2_5"), agent_template="react_en")
    called = tool_conversations()["call"]
    assert "\nAction: get_weather\n" not in own.render(own.renderer.prepare(called))
    assert "assistant\nAction: get_weather\nAction Input: {" in other.render(other.renderer.prepare(called))
    assert other.stop_words == ("Observation:",)
    assert other.identity() != own.identity()
    with pytest.raises(ConfigError, match=r"^--agent_template hermis is unknown; did you mean hermes\? wanted one of chatglm4, "):
        ChatTemplate(tokenizer_for("qwen2_5"), agent_template="hermis")
    with pytest.raises(
        ConfigError, match=r"^--agent_template glm4_5 is what .* by itself, and this one writes hermes; give --template glm4_5, or one"
    ):
        ChatTemplate(tokenizer_for("qwen2_5"), agent_template="glm4_5")
    with pytest.raises(ConfigError, match=r"and this one writes none; give --template mistral"):
        ChatTemplate(tokenizer_for("chatml"), agent_template="mistral")


def test_text_of_a_model_in_a_dialect_is_read_with_what_stands_around_the_calls() -> None:
    react = parse_answer('Thought: I look.\nAction: f\nAction Input: {"a": 1}\nObservation:', "react")
    assert (react.content, react.tool_calls[0]["function"]) == ("Thought: I look.", {"name": "f", "arguments": {"a": 1}})
    lfm2 = parse_answer("<|tool_call_start|>[f(a=')', b=[1, {'c': None}]), g()]<|tool_call_end|>On it.", "lfm2")
    assert [each["function"] for each in lfm2.tool_calls] == [
        {"name": "f", "arguments": {"a": ")", "b": [1, {"c": None}]}},
        {"name": "g", "arguments": {}},
    ]
    assert lfm2.content == "On it."
    glm4 = parse_answer('\nI look.<|assistant|>f\n{"a": 1}<|assistant|>g\n{}', "glm4")
    assert [each["function"]["name"] for each in glm4.tool_calls] == ["f", "g"]
    assert glm4.content == "I look."
    assert parse_answer('\nf\n{"a": 1} is how', "glm4").tool_calls == ()


def test_every_format_leaves_text_and_broken_calls_alone() -> None:
    for name in FORMATS:
        for text in ("Paris.", "", " lead\n", "{not json", '<tool_call>\n{"name": }\n</tool_call>', "[TOOL_CALLS]oh", "<tool_call> no name"):
            parsed = parse_answer(text, name)
            assert (parsed.content, parsed.tool_calls) == (text, ()), name
    assert find_format("{{ messages }}") is None


def test_text_beside_calls_is_kept() -> None:
    parsed = parse_answer('I look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>', "hermes")
    assert parsed.content == "I look."
    assert [each["function"] for each in parsed.tool_calls] == [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    harmony = '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
    assert parse_answer(harmony, "harmony").tool_calls[0]["function"] == {"name": "f", "arguments": {"a": 1}}
    llama = parse_answer('{"name": "f", "parameters": {"a": "x"}}; {"name": "g", "parameters": {}}', "llama3")
    assert [each["function"]["name"] for each in llama.tool_calls] == ["f", "g"]
    v3 = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    assert parse_answer(v3, "deepseek").tool_calls[0]["function"] == {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("calls", "fault"),
    [
        ([call("wether", city="x")], r"messages\[1\].tool_calls\[0\] calls 'wether', which has no schema; the tools are get_weather"),
        ([call("get_weather")], r"messages\[1\].tool_calls\[0\] \(get_weather\): arguments.city is missing, which the schema requires; got nothing"),
        ([call("get_weather", city="x"), call("get_weather", city=3)], r"tool_calls\[1\] \(get_weather\): arguments.city is 3, wanted string"),
        ([call("get_weather", city="x", days=True)], r"arguments.days is true, wanted integer"),
        ([call("get_weather", city="x", dais=1)], r"arguments.dais is not in the schema, which has city, days"),
        ([{"function": {"name": "get_weather", "arguments": "{city"}}], r"the arguments are no JSON"),
        ([{"function": {"name": "get_weather", "arguments": [1]}}], r"the arguments are a list of 1, wanted an object"),
        ([{"name": "get_weather"}], r"is no tool call, wanted"),
    ],
)
def test_a_call_that_does_not_fit_its_schema_is_refused(calls: list[Any], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        check_tools(Conversation([user("x"), assistant("", tool_calls=calls)], [WEATHER]))
    check_tools(Conversation([user("x"), assistant("", tool_calls=[call("get_weather", city="x", days=2.0)])], [WEATHER]))


def test_schemas_are_checked_and_templates_that_would_drop_tools_refuse() -> None:
    with pytest.raises(DataError, match=r"^tools\[0\] is no tool schema, wanted"):
        check_tools(Conversation([user("x")], [{"name": "f"}]))
    with pytest.raises(DataError, match=r"^tools\[0\] \(f\): parameters is an object with type, wanted a JSON schema of type object$"):
        check_tools(Conversation([user("x")], [{"function": {"name": "f", "parameters": {"type": "string"}}}]))
    with pytest.raises(DataError, match=r"which has no schema; the tools are none: the row has no tools"):
        check_tools(Conversation([user("x"), assistant("", tool_calls=[call("f")])]))
    with pytest.raises(
        DataError,
        match=r"^the chat template of tiny-chatml leaves tools out; give a --template that does \(such as qwen2_5, or --agent_template hermes\)$",
    ):
        ChatTemplate(tokenizer_for("chatml")).encode(Conversation([user("x"), assistant("y")], [WEATHER]))
    two = [call("get_weather", city="x"), call("get_weather", city="y")]
    with pytest.raises(DataError, match=r"^messages\[1\] makes 2 tool calls, and the chat template of tiny-gpt_oss writes one a turn; split it$"):
        ChatTemplate(tokenizer_for("gpt_oss")).encode(Conversation([user("x"), assistant("", tool_calls=two)], [WEATHER]))


def test_ids_are_made_where_a_template_wants_them_and_answers_get_the_call_they_belong_to() -> None:
    calls = [call("get_weather", city="x"), call("get_weather", city="y")]
    messages = add_ids([user("?"), assistant("", tool_calls=calls), answer("1"), answer("2")], named=False)
    made = [each["id"] for each in messages[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in messages[2:]] == made
    assert len(set(made)) == 2
    assert all(len(each) == 9 and each.isalnum() for each in made)
    named = add_ids([user("?"), assistant("", tool_calls=calls)], named=True)
    assert [each["id"] for each in named[1]["tool_calls"]] == ["functions.get_weather:0", "functions.get_weather:1"]
    assert "id" not in calls[0], "the row stays as it was"


def test_a_generated_turn_is_parsed_by_its_tokens_and_its_end_is_left_out() -> None:
    for name in ("qwen2_5", "mistral_nemo", "gpt_oss", "glm4_5", "kimi_k2"):
        template = ChatTemplate(tokenizer_for(name))
        conversation = Conversation([user("x"), assistant("", tool_calls=[call("get_weather", city="Rome", days=2)])], [WEATHER])
        row = template.encode_rows(conversation)[-1]
        generated = [token for token, weight in zip(row.input_ids, row.weights, strict=True) if weight]
        parsed = template.parse(generated, [WEATHER])
        assert [each["function"] for each in parsed.tool_calls] == [{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}], name
    chat = ChatTemplate(tokenizer_for("chatml"))
    assert chat.parse(chat.tokenizer("Hello<|im_end|>", add_special_tokens=False)["input_ids"]).content == "Hello"
