"""A chat template at work: conversations to text, and what the template takes and what it leaves out, found out by trying."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateSyntaxError

from mswift.errors import DataError, one_line
from mswift.log import get_logger
from mswift.templates.conversation import Conversation, Message, Tool
from mswift.templates.dialects import Dialect, dialect_for
from mswift.templates.environment import REFUSALS, compile_template, render, split_marks, with_reasoning
from mswift.templates.tool_calls import find_format
from mswift.templates.tools import add_ids, check_tools, write_call

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = get_logger("mswift.templates.renderer")
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLAIN_ROLES = frozenset({"user", "assistant"})
_ASK: Message = {"role": "user", "content": "x"}
_INSTEAD = "such as qwen2_5, or --agent_template hermes"
_PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "probe_name",
        "description": "probe words",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "probe"}}, "required": ["probe_key"]},
    },
}


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How a template wants tool calls.

    Args:
        as_text: arguments as JSON text, not as an object. without_content: no ``content`` where it is empty. ids: calls and answers need an id.
    """

    as_text: bool
    without_content: bool
    ids: bool


class Renderer:
    """Text of conversations by one template.

    Args:
        text: the template's Jinja. variables: special tokens and settings that it may use. name: whose it is, for errors.
        agent_template: in which dialect tools are written, if not in the template's own.
    """

    def __init__(self, text: str, variables: Mapping[str, Any], name: str, agent_template: str | None = None) -> None:
        self.text, self.variables, self.name = text, dict(variables), name
        self.has_generation_blocks = bool(_GENERATION_BLOCK.search(text))
        self._answers: dict[str, Any] = {}
        writes_tools = self.takes_tools and self.tool_style is not None
        self.dialect: Dialect | None = dialect_for(agent_template, find_format(text), writes_tools, text)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, text: str, settings: Mapping[str, Any], agent_template: str | None = None) -> Renderer:
        """A renderer with the special tokens of a tokenizer."""
        return cls(text, {**tokenizer.special_tokens_map, **settings}, tokenizer.name_or_path or "the tokenizer", agent_template)

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises `DataError` where the template refuses it or is broken."""
        return self._render(conversation, add_generation_prompt=add_generation_prompt)

    def render_marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the ranges of its ``{% generation %}`` blocks."""
        return split_marks(self._render(conversation, mark_generation=True))

    def _render(self, conversation: Conversation, *, add_generation_prompt: bool = False, mark_generation: bool = False) -> str:
        variables = {**self.variables, **conversation.kwargs} if conversation.kwargs else self.variables
        try:
            return render(
                compile_template(self.text),
                conversation.messages,
                conversation.tools,
                add_generation_prompt=add_generation_prompt,
                kwargs=variables,
                mark_generation=mark_generation,
            )
        except REFUSALS as error:
            raise self._refused(conversation.messages, error) from error

    def prepare(self, conversation: Conversation, system: str | None = None) -> Conversation:
        """The conversation as the template reads it, with the system prompt in front where it brings none.

        Raises:
            DataError: the template would leave something of it out, or a tool call is wrong.
        """
        messages = [with_reasoning({key: value for key, value in message.items() if _is_given(key, value)}) for message in conversation.messages]
        if system is not None and not (messages and messages[0].get("role") in ("system", "developer")):
            messages = [{"role": "system", "content": system}, *messages]
        has_calls = any(message.get("tool_calls") for message in messages)
        if conversation.tools or has_calls:
            check_tools(conversation)
            conversation = Conversation(messages, conversation.tools, conversation.kwargs)
            if self.dialect is not None:
                conversation = self.dialect.fold(conversation, takes_system=self.takes_system)
                has_calls = any(message.get("tool_calls") for message in conversation.messages)
            messages = self._prepare_tools(conversation.messages, has_calls=has_calls, tools=conversation.tools)
        if "reasoning" not in self._answers and any(message.get("reasoning_content") for message in messages):
            self._known("reasoning", self._tell_of_reasoning)
        for role in {str(message.get("role")) for message in messages} - _PLAIN_ROLES:
            if self.ignores(role):
                raise DataError(f"the chat template of {self.name} ignores {role!r} turns; remove them or fold them into a user turn")
        if any(isinstance(message.get("content"), list) for message in messages):
            messages = [self._with_text(i, message) for i, message in enumerate(messages)]
        return Conversation(messages, conversation.tools, conversation.kwargs)

    # ---- what the template takes -----------------------------------------------------------------------------------------------------

    def ignores(self, role: str) -> bool:
        """Whether the template leaves out what a turn of this role says; one that refuses the role does not ignore it."""
        if role not in self._answers:
            answer = {"role": "assistant", "content": "y"}
            turns = [{"role": role, "content": content} for content in ("a", "b")]
            places: list[Any] = [lambda turn: [turn, _ASK] if role in ("system", "developer") else [_ASK, answer, turn]]
            if role == "tool" and self.tool_style is not None:
                style = self.tool_style
                places.append(lambda turn: [*_probe_messages(style)[:2], {**_probe_messages(style)[2], **turn}])
            self._answers[role] = all(self._same(*(Conversation(place(turn), [_PROBE_TOOL]) for turn in turns)) for place in places)
        return bool(self._answers[role])

    @property
    def tool_style(self) -> ToolStyle | None:
        """How tool calls have to be handed to the template; None where it does not write them."""
        return self._known("tool style", self._find_tool_style)

    @property
    def takes_tools(self) -> bool:
        """Whether the template writes the schemas of tools."""
        return bool(self._known("tools", lambda: not self._same(Conversation([_ASK]), Conversation([_ASK], [_PROBE_TOOL]), refused=True)))

    @property
    def takes_system(self) -> bool:
        """Whether the template writes system turns."""
        return not self.ignores("system") and bool(self._known("takes system", lambda: self._try([{"role": "system", "content": "x"}, _ASK])))

    @property
    def drops_calls_beside_content(self) -> bool:
        """Whether a turn that says something loses its tool calls, or the other way round."""
        return bool(self._known("dropped calls", self._find_dropped))

    @property
    def takes_blocks(self) -> bool:
        """Whether the template reads content that is a list of text blocks."""
        blocks = Conversation([{"role": "user", "content": [{"type": "text", "text": "x"}]}])
        return bool(self._known("blocks", lambda: self._same(blocks, Conversation([_ASK]))))

    def probe_call(self) -> str:
        """A short conversation that ends with a tool call; empty where the template writes none."""
        return "" if self.tool_style is None else self._try(_probe_messages(self.tool_style)[:2])

    def _known(self, question: str, find: Any) -> Any:
        if question not in self._answers:
            self._answers[question] = find()
        return self._answers[question]

    def _same(self, first: Conversation, second: Conversation, *, refused: bool = False) -> bool:
        try:
            return self.render(first) == self.render(second)
        except DataError:
            return refused

    def _find_tool_style(self) -> ToolStyle | None:
        for as_text in (False, True):
            for without_content in (False, True):
                for ids in (False, True):
                    style = ToolStyle(as_text, without_content, ids)
                    text = self._try(_probe_messages(style, ids=ids))
                    if "probe_name" in text and "probe_value" in text and "'probe_key'" not in text:
                        other = self._try(_probe_messages(style, ids=ids, letter="b"))
                        return ToolStyle(as_text, without_content, ids or text != other or text != self._try(_probe_messages(style, ids=True)))
        return None

    @property
    def takes_one_call(self) -> bool:
        """Whether a turn that makes several calls would lose all but one."""
        return bool(self._known("one call", self._find_one_call))

    def _find_one_call(self) -> bool:
        messages = _probe_messages(self.tool_style, ids=True) if self.tool_style else []
        if messages:
            second = {**messages[1]["tool_calls"][0], "id": "b" * 9}
            second["function"] = {**second["function"], "name": "probe_other"}
            messages[1]["tool_calls"].append(second)
        return "probe_other" not in self._try(messages[:2])

    def _find_dropped(self) -> bool:
        if self.tool_style is None:
            return True
        text = self._try(_probe_messages(self.tool_style, ids=True, content="probe_content"))
        return not ("probe_name" in text and "probe_content" in text)

    def _tell_of_reasoning(self) -> bool:
        """Says, once, that the reasoning of an answer is neither written nor opened by the prompt, where that is so."""
        written, other = (Conversation([_ASK, {"role": "assistant", "content": "y", "reasoning_content": text}]) for text in ("a", "b"))
        dropped = self._same(written, other) and not self.render(Conversation([_ASK]), add_generation_prompt=True).rstrip().endswith("<think>")
        if dropped:
            logger.warning(
                "the chat template of %s leaves reasoning_content out, so answers are trained without it; put it into their content, or give a "
                "--template that writes it, such as qwen3",
                self.name,
            )
        return dropped

    def _try(self, messages: Sequence[Message]) -> str:
        try:
            return self.render(Conversation(messages, [_PROBE_TOOL]))
        except DataError:
            return ""

    # ---- the conversation as the template reads it -----------------------------------------------------------------------------------

    def _prepare_tools(self, messages: Sequence[Message], *, has_calls: bool, tools: Sequence[Tool]) -> list[Message]:
        if tools and not self.takes_tools:
            raise DataError(f"the chat template of {self.name} leaves tools out; give a --template that does ({_INSTEAD})")
        style = self.tool_style
        if not has_calls:
            return list(messages)
        if style is None:
            raise DataError(f"the chat template of {self.name} does not write tool calls; give a --template that does ({_INSTEAD})")
        written = [self._with_calls(i, message, style) for i, message in enumerate(messages)]
        return add_ids(written, named="tool_call_argument_begin" in self.text) if style.ids else written

    def _with_calls(self, index: int, message: Message, style: ToolStyle) -> Message:
        if not message.get("tool_calls"):
            return {key: value for key, value in message.items() if key != "tool_calls"}
        if message.get("content") and self.drops_calls_beside_content:
            raise DataError(
                f"messages[{index}] has both content and tool_calls, and the chat template of {self.name} writes only one of them; empty its content"
            )
        if len(message["tool_calls"]) > 1 and self.takes_one_call:
            raise DataError(
                f"messages[{index}] makes {len(message['tool_calls'])} tool calls, and the chat template of {self.name} writes one a turn; split it"
            )
        calls = [write_call(call, f"messages[{index}].tool_calls[{j}]", as_text=style.as_text) for j, call in enumerate(message["tool_calls"])]
        written = {**message, "tool_calls": calls}
        if not message.get("content"):
            written["content"] = ""
            if style.without_content:
                del written["content"]
        return written

    def _with_text(self, index: int, message: Message) -> Message:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        for block in content:
            if not isinstance(block, dict) or block.get("type") != "text":
                kind = block.get("type") if isinstance(block, dict) else block
                raise DataError(f"messages[{index}].content has a block of type {kind!r}, and this model reads text only; remove it")
        return message if self.takes_blocks else {**message, "content": "\n".join(str(block["text"]) for block in content)}

    def _refused(self, messages: Sequence[Message], error: Exception) -> DataError:
        if isinstance(error, TemplateSyntaxError):
            where = "chat_template.jinja (or tokenizer_config.json)"
            what = one_line(Exception(error.message or ""))
            return DataError(f"the chat template of {self.name} is broken at line {error.lineno}: {what}; mend it in its {where}")
        roles = ", ".join(str(message.get("role")) for message in messages) or "(none)"
        return DataError(f"the chat template refused a conversation with the roles {roles}: {one_line(error)}")


def _is_given(key: str, value: Any) -> bool:
    return value is not None and not (key == "tool_calls" and not value)


def _probe_messages(style: ToolStyle, *, ids: bool = False, letter: str = "a", content: str = "") -> list[Message]:
    arguments: Any = {"probe_key": "probe_value"}
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": "probe_name", "arguments": json.dumps(arguments) if style.as_text else arguments},
    }
    asked: Message = {"role": "assistant", "content": content, "tool_calls": [call]}
    answer: Message = {"role": "tool", "content": "probe_answer"}
    if ids or style.ids:
        call["id"] = answer["tool_call_id"] = letter * 9
    if style.without_content and not content:
        del asked["content"]
    return [_ASK, asked, answer]
