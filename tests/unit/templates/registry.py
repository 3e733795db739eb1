"""Conversations of every kind, and a tokenizer for each template that mswift ships."""

from __future__ import annotations

import functools
import random
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from mswift.templates import Conversation
from mswift.templates.named import find_template
from tests.unit.templates.conftest import KINDS

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}, "days": {"type": "integer", "description": "How many"}},
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Time of a zone",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "UTC or so"}}, "required": []},
    },
}
_WORDS = [
    "",
    " ",
    "Paris",
    "two\nlines",
    "\n\nlead",
    "trail\n",
    " x ",
    "héllo wörld",
    "你好，世界。",
    "🙂🙃",
    "1234",
    "{'a': 1}",
    "<b>&amp;</b>",
    "the\tthe",
]
_SPECIAL_BOS = {"deepseek_r1": "<｜begin▁of▁sentence｜>", "deepseek_v3": "<｜begin▁of▁sentence｜>", "gemma": "<bos>", "gemma3": "<bos>"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def answer(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def plain_conversations() -> dict[str, Conversation]:
    """System, one and many turns, unicode, empty turns, reasoning; and some that a seeded generator makes."""
    think = "<think>\n{}\n</think>\n\n{}"
    made = {
        "one turn": [user("What is the capital of France?"), assistant("Paris.")],
        "system": [{"role": "system", "content": "Be short."}, user("Hi"), assistant("Hello")],
        "many turns": [user("One?"), assistant("1"), user("Two?"), assistant("2"), user("Three?"), assistant("3")],
        "system, many turns": [{"role": "system", "content": "Count."}, user("One?"), assistant("1"), user("Two?"), assistant("2")],
        "unicode": [user("你好 🙂 é e\u0301"), assistant("Привет, 世界 🙃")],
        "empty turns": [user(""), assistant(""), user("x"), assistant("")],
        "thinking": [user("One?"), assistant(think.format("it is one", "1")), user("Two?"), assistant(think.format("now two", "2"))],
    }
    draw = random.Random(7)
    for number in range(5):
        messages = [{"role": "system", "content": draw.choice(_WORDS[2:])}] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 4)):
            messages += [user(draw.choice(_WORDS)), assistant(draw.choice(_WORDS))]
        made[f"drawn {number}"] = messages
    return {name: Conversation(messages) for name, messages in made.items()}


def tool_conversations() -> dict[str, Conversation]:
    """Calls, answers, two calls at once, an answer after several rounds."""
    asked = [user("Weather in 東京?"), assistant("", tool_calls=[call("get_weather", city="東京", days=2)]), answer('{"sky": "clear"}')]
    return {
        "tools unused": Conversation([user("Hi"), assistant("Hello")], [WEATHER, CLOCK]),
        "call": Conversation(asked[:2], [WEATHER, CLOCK]),
        "call and answer": Conversation([*asked, assistant("Clear for two days.")], [WEATHER, CLOCK]),
        "two rounds": Conversation(
            [
                *asked,
                assistant("Clear."),
                user("And the time?"),
                assistant("", tool_calls=[call("clock", zone="UTC+9")]),
                answer("noon"),
                assistant("12"),
            ],
            [WEATHER, CLOCK],
        ),
        "system and tools": Conversation([{"role": "system", "content": "Be short."}, *asked, assistant("Clear.")], [WEATHER]),
    }


@functools.cache
def _base(kind: str) -> Tokenizer:
    return KINDS[kind](["<s>", "</s>", "<unk>"])


@functools.cache
def tokenizer_for(name: str, kind: str = "byte_level") -> PreTrainedTokenizerFast:
    """A small real tokenizer that has every token of the template ``name`` as one token, and carries the template."""
    template = find_template(name)
    ends = [token for token in template.tokens if token in ("<|im_end|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<seed:eos>")]
    bos, eos = "<s>", ends[0] if ends else "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_base(kind).to_str()), bos_token=bos, eos_token=eos, pad_token="</s>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (bos, "</s>", *template.tokens) if token != "eos_token"])
    tokenizer.chat_template = template.text
    tokenizer.name_or_path = f"tiny-{name}"
    return tokenizer
