"""From the columns of a row to conversations: which of the known shapes it has, and what is missing where it has none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from mswift.data.columns import map_conversation, map_question
from mswift.data.faults import Placed, fail, got, names, text, unpacked
from mswift.data.messages import DEFAULT_NAMES, Message, MessageNames, read_messages

Want: TypeAlias = Literal["answer", "prompt", "text", "preference", "label", "either"]
"""What a row is for: an answer to train on, a prompt to answer, plain text, a chosen and a rejected answer, an answer with a verdict; or ``either``:
``preference`` where it brings a rejected answer, else ``answer``."""

_SHAPES = "messages, instruction/input/output or query/response"


@dataclass(slots=True)
class Shape:
    """A row on its way.

    Args:
        raw: its place. data: the columns that are left. want: what it is for. auto: whether names of columns are guessed.
        name: of the shape, once it is known. mapped: columns that were renamed.
    """

    raw: Placed
    data: dict[str, Any]
    want: Want
    auto: bool = True
    given: MessageNames = DEFAULT_NAMES
    name: str = ""
    mapped: dict[str, str] = field(default_factory=dict)

    def conversation(self) -> list[Message]:
        """Takes the columns of the conversation out of `data`.

        Raises:
            DataError: no known shape, or a column that is missing or wrong.
        """
        if self.auto:
            self.mapped |= map_conversation(self.data)
        if "messages" in self.data:
            self.name = "ShareGPT" if "conversations" in self.mapped else "messages"
            messages = read_messages(self.raw, "messages", self.data.pop("messages"), self.given)
        else:
            messages = self._from_fields()
        system = self.data.pop("system", None)
        if system is not None and not (messages and messages[0]["role"] in ("system", "developer")):
            messages.insert(0, {"role": "system", "content": text(self.raw, "system", system)})
        return messages

    def _from_fields(self) -> list[Message]:
        data, raw = self.data, self.raw
        columns = names(data)
        if "instruction" in data and (not self.auto or {"input", "output"} & set(data)) and "query" not in data:
            self.name, question, answer = "alpaca", "instruction", "output"
            if "output" not in data and self.auto:
                kept: dict[str, Any] = {name: data.pop(name) for name in ("instruction", "input") if name in data}
                self.mapped |= map_question(data, keep_answer=self.want == "prompt")
                data |= kept
                answer = "response" if "response" in data else "output"
        else:
            if self.auto:
                self.mapped |= map_question(data, keep_answer=self.want == "prompt")
            self.name, question, answer = "query/response", "query", "response"
        if data.get(question) is None and not self._is_text(answer):
            hint = "; plain text is for mswift pt" if data.get(answer) is not None else ""
            fail(raw, f"got the columns {columns}, wanted {_SHAPES}; map them with --columns{hint}")
        messages: list[Message] = []
        for i, pair in enumerate(_history(raw, data.pop("history", None))):
            messages += _round(text(raw, f"history[{i}][0]", pair[0]), text(raw, f"history[{i}][1]", pair[1]))
        return messages + self._question(question) + self._answer(answer, columns)

    def _is_text(self, answer: str) -> bool:
        if self.want == "text" and self.data.get(answer) is not None:
            self.name = "text"
            return True
        return False

    def _question(self, name: str) -> list[Message]:
        value = unpacked_list(self.data.pop(name, None))
        if isinstance(value, list) and value and isinstance(value[0], dict):  # a prompt that is a conversation
            return read_messages(self.raw, name, value, self.given)
        if value is None and self.name == "text":
            return []
        question = text(self.raw, name, value)
        extra = self.data.pop("input", None) if name == "instruction" else None
        if extra not in (None, ""):
            question = f"{question}\n{text(self.raw, 'input', extra)}"
        return [{"role": "user", "content": question}]

    def _answer(self, name: str, columns: str) -> list[Message]:
        needed = self.want in ("answer", "label", "text")
        if name not in self.data and needed:
            fail(self.raw, f"{name} is missing, got the columns {columns}")
        value = self.data.pop(name, None)
        if value is None and not needed:
            return []
        value = unpacked_list(value)
        if isinstance(value, list) and value:
            if isinstance(value[0], dict):
                return read_messages(self.raw, name, value, self.given)
            value = value[0]  # several right answers: the first one
        return [{"role": "assistant", "content": text(self.raw, name, value)}]


def unpacked_list(value: Any) -> Any:
    """A conversation in a cell of text; any other text, one that looks like JSON too, stays text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        inner = unpacked(value)
        if isinstance(inner, list) and inner and all(isinstance(item, dict) and {"role", "from"} & set(item) for item in inner):
            return inner
    return value


def _history(raw: Placed, value: Any) -> list[Any]:
    value = unpacked(value)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        fail(raw, f"history is {got(value)}, wanted a list of [question, answer] pairs")
    for i, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            fail(raw, f"history[{i}] is {got(pair)}, wanted a [question, answer] pair")
    return value


def _round(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_verdict(raw: Placed, data: Mapping[str, Any]) -> bool:
    """The ``label`` of a row of KTO: whether its answer is wanted."""
    value = data.get("label")
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "-1": False}
    verdict = words.get(str(value).strip().lower())
    if verdict is None:
        fail(raw, f"label is {got(value)}, wanted true (the answer is wanted) or false")
    return verdict
