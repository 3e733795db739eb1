"""From messages to the token ids that a model goes on from: the chat template's prompt, and what every answer has to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mswift.data.encoding import to_conversation
from mswift.data.rows import Row
from mswift.errors import DataError
from mswift.templates import ChatTemplate, Conversation, Message, Tool


class PromptEncoder:
    """Messages -> prompt ids.

    Args:
        template: of the checkpoint. prefix: text that every answer begins with; the model goes on after it.
    """

    def __init__(self, template: ChatTemplate, prefix: str = "") -> None:
        self.template, self.prefix = template, prefix
        self._prefix_ids: list[int] = template.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []

    def encode(self, conversation: Conversation | Sequence[Message]) -> list[int]:
        """Raises `DataError` where the template refuses the conversation."""
        return self.template.encode_prompt(conversation) + self._prefix_ids


@dataclass(frozen=True, slots=True)
class Question:
    """A row to answer.

    Args:
        messages: what the model is shown. label: the row's own answer, or None. prompt: token ids. columns: the row's other columns.
        tools: schemas of the tools that the answer may call.
    """

    messages: list[Message]
    label: str | None
    prompt: list[int]
    columns: dict[str, Any]
    tools: Sequence[Tool] = ()


def make_questions(rows: Sequence[Row], encoder: PromptEncoder, *, max_length: int, cut_to: int | None = None) -> list[Question]:
    """Rows to questions; a last assistant turn is the label and is not shown to the model.

    Args:
        max_length: tokens of prompt and answer together; a prompt leaves room for at least one.
        cut_to: of a prompt with more tokens than this the end is kept. None: a prompt without room for an answer is an error.

    Raises:
        DataError: with file and line: nothing to answer, the template refuses the row, or its prompt is too long.
    """
    questions = []
    for row in rows:
        messages = [dict(message) for message in row.messages]
        label = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if not messages:
            raise DataError(f"{row.where}: holds an assistant turn only; wanted a user turn to answer")
        try:
            prompt = encoder.encode(replace(to_conversation(row), messages=messages))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if cut_to is not None:
            prompt = prompt[-cut_to:]
        elif len(prompt) >= max_length:
            raise DataError(
                f"{row.where}: the prompt has {len(prompt)} tokens and the longest sequence is {max_length}; shorten the row, or give "
                "--truncation_strategy left to keep the end of it"
            )
        questions.append(Question(messages, label, prompt, row.columns, row.tools or ()))
    return questions
