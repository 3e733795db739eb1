"""What is read off a template's syntax about its use of contents."""

from __future__ import annotations

import pytest

from mswift.templates.content_use import ContentUse, content_use
from mswift.templates.environment import parse_template
from mswift.templates.named import find_template, table

LOOP = "{% for message in messages %}%s{% endfor %}"


def use(body: str) -> ContentUse | None:
    return content_use(parse_template(LOOP.replace("%s", body)))


@pytest.mark.parametrize(
    "body",
    [
        "{{ message.content | upper }}",
        "{{ message['content'][1:] }}",
        "{{ message.content | length }}",
        "{% if message.content | trim %}x{% endif %}",
        "{% if 'a' in (message.content + 'b') %}x{% endif %}",
        "{{ message | tojson }}",
        "{% for key in message %}{{ message[key] }}{% endfor %}",
        "{% for key, value in message.items() %}{{ value }}{% endfor %}",
        "{% set x %}{{ message.content }}{% endset %}{{ x | trim }}",
        "{% set ns = namespace(text='') %}{% set ns.text = message.content %}{{ ns.text | upper }}",
        "{% macro say(text) %}{{ text | upper }}{% endmacro %}{{ say(message.content) }}",
        "{% macro say(text) %}{{ text }}{% endmacro %}{{ say(message.content) | trim }}",
        "{% if message == messages[-1] %}x{% endif %}",
        "{% if message.content.isdigit() %}x{% endif %}",
        "{% if message.content > 'a' %}x{% endif %}",
        "{% if message.content in 'abc' %}x{% endif %}",
        "{{ messages | map(attribute='content') | join }}",
        "{% filter upper %}{{ message.content }}{% endfilter %}",
        "{% if loop.changed(message.content) %}x{% endif %}",
        "{{ (message.content | trim).lstrip('x') }}",
        "{% if messages[5].content is string %}{% else %}{{ message.content | upper }}{% endif %}",
        "{% set x = '' %}{% if loop.last %}{% set x = message.content %}{% endif %}{% if not x %}{{ message.content | upper }}{% endif %}",
        "{{ {'a': message.content}.a | upper }}",
        "{{ ([message.content] | first).upper() }}",
    ],
)
def test_what_looks_into_contents_is_found(body: str) -> None:
    assert use(body) is None
    assert use("{{ message.content }}" + body) is None


@pytest.mark.parametrize(
    ("body", "questions", "trims"),
    [
        ("{{ '<|' + message['role'] + message['content'] + '|>' }}", set(), set()),
        ("{{ message.get('content') ~ bos_token }}", set(), set()),
        ("{{ message.content | trim }}{{ messages[0].content.lstrip('\\n') }}", set(), {("strip", None), ("lstrip", "\n")}),
        ("{% if message.content %}{{ message.content }}{% endif %}", {("empty", "")}, set()),
        ("{% if 'q' in message.content %}{{ message.content | upper }}{% else %}{{ message.content }}{% endif %}", {("in", "q")}, set()),
        ("{% if 'q' not in message.content %}x{% else %}{{ message.content | upper }}{% endif %}", {("in", "q")}, set()),
        ("{% if loop.last and message.content.startswith('q') %}{{ message.content.split('q') }}{% endif %}", {("startswith", "q")}, set()),
        ("{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}", set(), set()),
        ("{% set c = message.content %}{% if c == 'q' %}{{ c | upper }}{% endif %}{{ c }}", {("eq", "q")}, set()),
        ("{% macro say(text) %}{{ text }}{% endmacro %}{{ say(message.content) }}", set(), set()),
    ],
)
def test_what_is_harmless_is_known_with_its_questions(body: str, questions: set[object], trims: set[object]) -> None:
    found = use(body)
    assert found is not None
    assert found.questions == questions
    assert found.trims == trims
    assert found.is_plain("plain text")
    assert found.is_plain("q") == (not questions or questions == {("empty", "")})


def test_most_shipped_templates_only_write() -> None:
    plain = {name for name in table() if content_use(parse_template(find_template(name).text)) is not None}
    assert {"chatml", "smollm2", "llama3", "qwen2_5", "qwen3", "gemma", "phi4", "zephyr"} <= plain
    assert len(plain) >= 25
    assert not plain & {"deepseek_r1", "glm4_5", "gpt_oss", "qwen3_5"}
