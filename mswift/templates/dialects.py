"""Tool calls as text, for chat templates that write none of their own (``--agent_template``), and for those that write schemas but no calls.

A dialect says how schemas stand in the system prompt, how the assistant writes a call, and how answers come back. Where the conversation is folded
by one, the chat template sees plain turns only. `tool_calls` reads calls of the same dialect back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mswift.config.fields import nearest
from mswift.errors import ConfigError
from mswift.templates.conversation import Conversation, Message, Tool
from mswift.templates.tools import read_call

Call: TypeAlias = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way of writing tools.

    Args:
        form: name of the format in `mswift.templates.tool_calls` that reads its calls.
        schemas: text for the system prompt. calls: what the assistant writes. answers: the turn of a user that holds what tools said.
            None of each: the chat template writes them itself.
        stop_words: texts that end an answer which calls a tool.
    """

    form: str
    schemas: Callable[[Sequence[Tool]], str] | None = None
    calls: Callable[[Sequence[Call]], str] | None = None
    answers: Callable[[Sequence[str]], str] | None = None
    stop_words: tuple[str, ...] = ()

    def fold(self, conversation: Conversation, *, takes_system: bool) -> Conversation:
        """The conversation with as much of its tools as this dialect writes put into plain turns.

        Args:
            takes_system: whether the template has system turns; else schemas stand in front of the first user turn.
        """
        messages = [self._with_calls(i, message) for i, message in enumerate(conversation.messages)]
        if self.answers is not None:
            messages = self._with_answers(messages, self.answers)
        tools = conversation.tools
        if self.schemas is not None and tools:
            messages, tools = _with_schemas(messages, self.schemas(tools), takes_system), ()
        return Conversation(messages, tools, conversation.kwargs)

    def _with_calls(self, index: int, message: Message) -> Message:
        if self.calls is None or not message.get("tool_calls"):
            return message
        calls = [read_call(call, f"messages[{index}].tool_calls[{j}]") for j, call in enumerate(message["tool_calls"])]
        said = _text(message).rstrip("\n")
        written = f"{said}\n{self.calls(calls)}" if said else self.calls(calls)
        return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": written}

    def _with_answers(self, messages: Sequence[Message], write: Callable[[Sequence[str]], str]) -> list[Message]:
        made: list[Message] = []
        waiting: list[str] = []
        for message in [*messages, None]:
            if message is not None and message.get("role") == "tool":
                waiting.append(_text(message))
                continue
            if waiting:
                made.append({"role": "user", "content": write(waiting)})
                waiting = []
            made += [message] if message is not None else []
        return made


def _with_schemas(messages: Sequence[Message], text: str, takes_system: bool) -> list[Message]:
    first = messages[0]
    if first.get("role") in ("system", "developer"):
        return [{**first, "content": "\n\n".join(filter(None, (_text(first), text)))}, *messages[1:]]
    if takes_system:
        return [{"role": "system", "content": text}, *messages]
    at = next((i for i, message in enumerate(messages) if message.get("role") == "user"), 0)
    return [*messages[:at], {**messages[at], "content": f"{text}\n\n{_text(messages[at])}"}, *messages[at + 1 :]]


def _text(message: Message) -> str:
    content = message.get("content")
    return "".join(str(block.get("text", "")) for block in content) if isinstance(content, list) else content or ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _functions(tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    return [tool["function"] for tool in tools]


def _names(tools: Sequence[Tool]) -> str:
    return ",".join(function["name"] for function in _functions(tools))


# ---- Hermes ------------------------------------------------------------------------------------------------------------------------------

_SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\n"
)


def _signatures(tools: Sequence[Tool]) -> str:
    return _SIGNATURES.format("\n".join(map(_json, tools)))


def _hermes_schemas(tools: Sequence[Tool]) -> str:
    return _signatures(tools) + (
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _hunyuan_schemas(tools: Sequence[Tool]) -> str:
    return _signatures(tools) + (
        "For function call returns, you should first print <tool_calls>For each function call, you should return object like:\n"
        "<tool_call>function_name\n```json\nfunction_arguments_in_json_format\n```</tool_call>"
        "At the end of function call returns, you should print </tool_calls>"
    )


def _hermes_calls(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls)


def _hunyuan_calls(calls: Sequence[Call]) -> str:
    inner = "\n".join(f"<tool_call>{name}\n```json\n{_json(arguments)}\n```</tool_call>" for name, arguments in calls)
    return f"<tool_calls>{inner}</tool_calls>"


def _hermes_answers(answers: Sequence[str]) -> str:
    return "\n".join(f"<tool_response>\n{answer}\n</tool_response>" for answer in answers)


def _hunyuan_answers(answers: Sequence[str]) -> str:
    inner = "\n".join(f"<tool_response>{answer}</tool_response>" for answer in answers)
    return f"<tool_responses>{inner}</tool_responses>"


# ---- ReAct and its kin: words of their own in front of name, arguments and result ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Words:
    action: str
    arguments: str
    result: str

    def calls(self, calls: Sequence[Call]) -> str:
        return "\n".join(f"{self.action} {name}\n{self.arguments} {_json(arguments)}" for name, arguments in calls)

    def answers(self, answers: Sequence[str]) -> str:
        return "\n".join(f"{self.result} {answer}" for answer in answers)


_REACT = _Words("Action:", "Action Input:", "Observation:")
_FLOWERS = _Words("✿FUNCTION✿:", "✿ARGS✿:", "✿RESULT✿:")


def _described(tools: Sequence[Tool], line: str, joined: str = "\n\n") -> str:
    """`line` has places for name, description and parameters."""
    return joined.join(
        line.format(name=function["name"], description=function.get("description", ""), parameters=_json(function.get("parameters") or {}))
        for function in _functions(tools)
    )


_REACT_EN = (
    "Answer the following questions as best you can. You have access to the following tools:\n\n{described}\n\nUse the following format:\n\n"
    "Question: the input question you must answer\nThought: you should always think about what to do\n"
    "Action: the action to take, should be one of [{names}]\nAction Input: the input to the action\nObservation: the result of the action\n"
    "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\nThought: I now know the final answer\n"
    "Final Answer: the final answer to the original input question\n\nBegin!\n"
)
_REACT_ZH = (
    "尽可能地回答以下问题。你可以使用以下工具:\n\n{described}\n\n请按照以下格式进行:\n\n"
    "Question: 需要你回答的输入问题\nThought: 你应该总是思考该做什么\n"
    "Action: 需要使用的工具，应该是[{names}]中的一个\nAction Input: 传入工具的内容\nObservation: 行动的结果\n"
    "... (这个Thought/Action/Action Input/Observation可以重复N次)\nThought: 我现在知道最后的答案\n"
    "Final Answer: 对原始输入问题的最终答案\n\n现在开始！\n"
)
_TOOLBENCH = (
    "You can use many tools(functions) to do the following task.\nFirst I will give you the task description, and your task start.\n"
    "At each step, you need to give your thought to analyze the status now and what to do next, with a function call to actually execute your step. "
    "Your output should follow this format:\nThought:\nAction:\nAction Input:\n\n"
    "After the call, you will get the call result, and you are now in a new state.\n"
    "Then you will analyze your status now, then decide what to do next...\n"
    "After many (Thought-call) pairs, you finally perform the task, then you can give your final answer.\nRemember:\n"
    "1.the state change is irreversible, you can't go back to one of the former state, if you want to restart the task, "
    'say "I give up and restart".\n2.All the thought is short, at most in 5 sentence.\n'
    "3.You can do more then one try, so if your plan is to continuously try some conditions, you can do one of the conditions per try.\n"
    "Let's Begin!\nTask description: You should use functions to help handle the real time user queries. Remember:\n"
    '1.ALWAYS call "Finish" function at the end of the task. And the final answer should contain enough information to show to the user,'
    "If you can't handle the task, or you find that function calls always fail(the function is not valid now), "
    "use function Finish->give_up_and_restart.\n2.Do not use origin tool names, use only subfunctions' names.\n"
    "Specifically, you have access to the following APIs: "
)
_LINE_EN = (
    "{name}: Call this tool to interact with the {name} API. What is the {name} API useful for? {description} "
    "Parameters: {parameters} Format the arguments as a JSON object."
)
_LINE_ZH = "{name}: 调用此工具与 {name} API 进行交互。{name} 有什么用？{description} 输入参数：{parameters} 此工具的输入应为JSON对象。"
_QWEN_EN = (
    "# Tools\n\n## You have access to the following tools:\n\n{described}\n\n## When you need to call a tool, please insert the following command "
    "in your reply, which can be called zero or multiple times according to your needs:\n\n✿FUNCTION✿: The tool to use, should be one of [{names}]\n"
    "✿ARGS✿: The input of the tool\n✿RESULT✿: Tool results\n✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)"
)
_QWEN_ZH = (
    "# 工具\n\n## 你拥有如下工具：\n\n{described}\n\n## 你可以在回复中插入零次、一次或多次以下命令以调用工具：\n\n"
    "✿FUNCTION✿: 工具名称，必须是[{names}]之一。\n✿ARGS✿: 工具输入\n✿RESULT✿: 工具结果\n"
    "✿RETURN✿: 根据工具结果进行回复，需将图片用![](url)渲染出来"
)
_QWEN_EN_PARALLEL = (
    "# Tools\n\n## You have access to the following tools:\n\n{described}\n\n"
    "## Insert the following command in your reply when you need to call N tools in parallel:\n\n"
    "✿FUNCTION✿: The name of tool 1, should be one of [{names}]\n✿ARGS✿: The input of tool 1\n✿FUNCTION✿: The name of tool 2\n"
    "✿ARGS✿: The input of tool 2\n...\n✿FUNCTION✿: The name of tool N\n✿ARGS✿: The input of tool N\n✿RESULT✿: The result of tool 1\n"
    "✿RESULT✿: The result of tool 2\n...\n✿RESULT✿: he result of tool N\n"
    "✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)"
)
_QWEN_ZH_PARALLEL = (
    "# 工具\n\n## 你拥有如下工具：\n\n{described}\n\n## 你可以在回复中插入以下命令以并行调用N个工具：\n\n"
    "✿FUNCTION✿: 工具1的名称，必须是[{names}]之一\n✿ARGS✿: 工具1的输入\n✿FUNCTION✿: 工具2的名称\n✿ARGS✿: 工具2的输入\n...\n"
    "✿FUNCTION✿: 工具N的名称\n✿ARGS✿: 工具N的输入\n✿RESULT✿: 工具1的结果\n✿RESULT✿: 工具2的结果\n...\n✿RESULT✿: 工具N的结果\n"
    "✿RETURN✿: 根据工具结果进行回复，需将图片用![](url)渲染出来"
)
_QWEN_LINE_EN = "### {name}\n\n{name}: {description} Parameters: {parameters} Format the arguments as a JSON object."
_QWEN_LINE_ZH = "### {name}\n\n{name}: {description} 输入参数：{parameters} 此工具的输入应为JSON对象。"


def _worded(words: _Words, form: str, text: str, line: str) -> Dialect:
    def schemas(tools: Sequence[Tool]) -> str:
        return text.format(described=_described(tools, line), names=_names(tools))

    return Dialect(form, schemas, words.calls, words.answers, (words.result,))


# ---- of single families ------------------------------------------------------------------------------------------------------------------


def _deepseek_schemas(tools: Sequence[Tool]) -> str:
    """As vLLM's template of DeepSeek-V3 with tools writes them."""
    return _signatures(tools) + (
        "For function call returns, you should first print <｜tool▁calls▁begin｜>For each function call, you should return object like:\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜><function_name>\n```json\n<function_arguments_in_json_format>\n```<｜tool▁call▁end｜>"
        "At the end of function call returns, you should print <｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    )


def _granite_calls(calls: Sequence[Call]) -> str:
    return f"<|tool_call|>{_json([{'name': name, 'arguments': arguments} for name, arguments in calls])}"


def _lfm2_calls(calls: Sequence[Call]) -> str:
    return f"<|tool_call_start|>[{', '.join(f'{name}({_keywords(arguments)})' for name, arguments in calls)}]<|tool_call_end|>"


def _keywords(arguments: Mapping[str, Any]) -> str:
    plain = [f"{name}={_python(value)}" for name, value in arguments.items() if name.isidentifier()]
    others = {name: value for name, value in arguments.items() if not name.isidentifier()}
    return ", ".join([*plain, f"**{_python(others)}"] if others else plain)


def _python(value: Any) -> str:
    """A value as Python writes it, with the quotes of JSON."""
    if isinstance(value, str):
        return _json(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_json(str(key))}: {_python(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(_python, value))}]" if isinstance(value, list) else repr(value)


DIALECTS: dict[str, Dialect] = {
    "deepseek_v3": Dialect("deepseek", _deepseek_schemas),
    "hermes": Dialect("hermes", _hermes_schemas, _hermes_calls, _hermes_answers),
    "hunyuan_hermes": Dialect("hunyuan", _hunyuan_schemas, _hunyuan_calls, _hunyuan_answers),
    "qwen_en": _worded(_FLOWERS, "flowers", _QWEN_EN, _QWEN_LINE_EN),
    "qwen_en_parallel": _worded(_FLOWERS, "flowers", _QWEN_EN_PARALLEL, _QWEN_LINE_EN),
    "qwen_zh": _worded(_FLOWERS, "flowers", _QWEN_ZH, _QWEN_LINE_ZH),
    "qwen_zh_parallel": _worded(_FLOWERS, "flowers", _QWEN_ZH_PARALLEL, _QWEN_LINE_ZH),
    "react_en": _worded(_REACT, "react", _REACT_EN, _LINE_EN),
    "react_zh": _worded(_REACT, "react", _REACT_ZH, _LINE_ZH),
    "toolbench": Dialect("react", lambda tools: _TOOLBENCH + _json(_functions(tools)), _REACT.calls, _REACT.answers, (_REACT.result,)),
}
"""Value of ``--agent_template`` -> dialect; the texts of the system prompt are those by which ms-swift knows these names."""
_SUPPLEMENTS: dict[str, tuple[tuple[str, ...], Dialect]] = {
    "granite": (("available_tools", "<|tool_call|>"), Dialect("granite", calls=_granite_calls)),
    "lfm2": (("<|tool_list_start|>",), Dialect("lfm2", calls=_lfm2_calls)),
}
"""For templates that write schemas and leave the calls to whoever serves the model: markers of the template, and how the model calls."""
_OWN = {
    "chatglm4": "glm4", "deepseek_v3_1": "deepseek", "glm4": "glm4", "glm4_5": "glm", "glm4_7": "glm", "hermes": "hermes", "llama3": "llama3",
    "minimax_m2": "minimax_m2", "mistral": "mistral", "qwen3_5": "qwen_coder", "qwen3_coder": "qwen_coder", "seed_oss": "seed",
}  # fmt: skip
"""Names that ms-swift gives to what templates of families write themselves -> format of `tool_calls`."""
NAMES: tuple[str, ...] = tuple(sorted({*DIALECTS, *_OWN}))


def check_name(name: str) -> None:
    """Refuses a value of ``--agent_template`` that is not in `NAMES`. Raises `ConfigError`, with the nearest name."""
    if name not in NAMES:
        near = nearest(name, list(NAMES))
        raise ConfigError(f"--agent_template {name} is unknown; {f'did you mean {near}?' if near else ''} wanted one of {', '.join(NAMES)}")


def dialect_for(name: str | None, own_form: str | None, writes_tools: bool, text: str) -> Dialect | None:
    """How the tools of a conversation are folded before the template sees it; None where the template writes all by itself.

    Args:
        name: value of ``--agent_template``, or None. own_form: the template's format of calls. writes_tools: whether it writes schemas and calls.
        text: of the template.

    Raises:
        ConfigError: the name is that of another template's own format.
    """
    if name is None:
        return next((dialect for markers, dialect in _SUPPLEMENTS.values() if all(marker in text for marker in markers) and not writes_tools), None)
    check_name(name)
    if writes_tools and _OWN.get(name) == own_form:
        return None
    if name not in DIALECTS:
        writes = f"this one writes {own_form}" if own_form and writes_tools else "this one writes none"
        raise ConfigError(
            f"--agent_template {name} is what the chat template of that family writes by itself, and {writes}; give --template {name}, "
            f"or one of {', '.join(DIALECTS)}"
        )
    return DIALECTS[name]
