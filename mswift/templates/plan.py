"""The mask on the level of text: which characters of a conversation are trained, and in how many rows.

Where the template has ``{% generation %}`` blocks they say it. Everywhere else rendering does: an assistant turn begins where the prompt that it
would be served with ends, and it ends where rendering the conversation up to it ends. Nothing is found by looking for a string in the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mswift.errors import DataError
from mswift.templates.conversation import Conversation, Message
from mswift.templates.loss_scale import LossScale, Span
from mswift.templates.renderer import Renderer
from mswift.templates.spans import common_prefix

_LONGEST_OPENING = 20  # characters; more is another way of writing turns rather than the beginning of an answer


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What a template writes after an assistant's content.

    Args:
        trained: through the end-of-turn token. rest: what follows it, such as a newline. borrowed: for templates whose turns have no end of
            their own, the beginning of the turn that follows, by its role; it is what the model has to write to stop.
    """

    trained: str
    rest: str
    borrowed: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """A text to tokenise, and the weights of its characters (0 where none is given; a later span wins)."""

    text: str
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class _Turn:
    """One assistant turn: the text with it as last turn, and where in this text the model would have written (characters)."""

    text: str
    start: int
    end: int
    index: int


class Planner:
    """Plans rows.

    Args:
        opening: what the prompt opens of an answer although the rendered turn lacks it, such as ``<think>``.
        add_non_thinking_prefix: where the prompt opens the reasoning and a turn has none, close it again (else that is an error).
    """

    def __init__(self, renderer: Renderer, end: TurnEnd, opening: str, loss_scale: LossScale, *, add_non_thinking_prefix: bool = True) -> None:
        self.renderer, self.end, self.opening, self.loss_scale = renderer, end, opening, loss_scale
        self.add_non_thinking_prefix = add_non_thinking_prefix

    def plan(self, conversation: Conversation, *, one_row: bool = False) -> list[Plan]:
        """The rows of a prepared conversation.

        Raises:
            DataError: nothing to train, a turn that cannot be located, or (with `one_row`) turns that do not fit into one row.
        """
        messages = conversation.messages
        whole = self.renderer.render(conversation)
        weighed = self.loss_scale.strategies or any(message.get("loss") is False or "loss_scale" in message for message in messages)
        if self.loss_scale.base == "all" and not weighed:
            return [Plan(whole, [(0, len(whole), 1.0)])]
        trained = self._trained_turns(messages)
        turns = self._marked_turns(conversation, trained, whole) if self.renderer.has_generation_blocks else None
        if turns is None:
            turns = [self._turn(conversation, i, whole) for i in trained]
        plans = self._rows(messages, turns, whole)
        if self.loss_scale.base == "all" or (one_row and len(plans) > 1):
            self._want_one(plans, turns, whole)
        if self.loss_scale.base == "all":
            plans[0].spans.insert(0, (0, len(plans[0].text), 1.0))
        return plans

    def _trained_turns(self, messages: Sequence[Message]) -> list[int]:
        """Positions of the assistant turns that are trained (of all turns under ``all``); never empty."""
        first = 0
        if self.loss_scale.base == "last_round":
            first = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=0)
        assistants = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if self.loss_scale.base == "all":
            return [i for i in assistants if i]
        turns = [i for i in assistants if messages[i].get("loss", i >= first) and messages[i].get("loss_scale") != 0]
        if not turns:
            raise DataError("no assistant turn to train on; every training row needs one")
        return turns

    def _rows(self, messages: Sequence[Message], turns: list[_Turn], whole: str) -> list[Plan]:
        """As few rows as there can be: a turn goes into the row of a later one whose text begins with its own."""
        plans: list[Plan] = []
        for turn in reversed(turns):
            mine = turn.text[: turn.end]
            plan = next((plan for plan in plans if plan.text.startswith(mine)), None)
            if plan is None:
                plan = Plan(whole if whole.startswith(mine) and not plans else turn.text, [])
                plans.insert(0, plan)
            plan.spans[:0] = self._weigh(messages, turn)
        return plans

    def _weigh(self, messages: Sequence[Message], turn: _Turn) -> list[Span]:
        message = messages[turn.index]
        if message.get("loss") is False:
            return [(turn.start, turn.end, 0.0)]
        if isinstance(message.get("loss_scale"), int | float):
            return [(turn.start, turn.end, float(message["loss_scale"]))]
        if not self.loss_scale.strategies:
            return [(turn.start, turn.end, 1.0)]
        answer = turn.text[turn.start : turn.end]
        own_end = next((end for end in (self.end.trained, *self.end.borrowed.values()) if end and answer.endswith(end)), "")
        last = turn.end - len(own_end)
        query = next((_text(before) for before in reversed(messages[: turn.index]) if before.get("role") == "user"), "")
        spans = [(turn.start + start, turn.start + end, weight) for start, end, weight in self.loss_scale.weigh(turn.text[turn.start : last], query)]
        return [*spans, (last, turn.end, 1.0)] if own_end else spans

    # ---- turns -----------------------------------------------------------------------------------------------------------------------

    def _marked_turns(self, conversation: Conversation, trained: list[int], whole: str) -> list[_Turn] | None:
        """Turns by the ``{% generation %}`` blocks; ``None`` where they are not one to an assistant turn."""
        turns = []
        for index in trained:
            upto = conversation.upto(index + 1)
            text, blocks = self.renderer.render_marked(upto)
            if len(blocks) != sum(message.get("role") == "assistant" for message in upto.messages):
                return None
            start, end = blocks[-1]
            turns.append(_Turn(text, start, self._block_end(text, start, end), index))
        return turns

    def _block_end(self, text: str, start: int, end: int) -> int:
        """A block ends with the end-of-turn token, which the model must learn to write, and not with a newline after it."""
        trained, rest = self.end.trained, self.end.rest
        if text.startswith(trained, end):
            return end + len(trained)
        return end - len(rest) if text[start:end].endswith(trained + rest) else end

    def _turn(self, conversation: Conversation, index: int, whole: str) -> _Turn:
        messages = conversation.messages
        if index == 0:
            raise DataError("messages[0] is an assistant turn: nothing would be served before it; drop it or put a user turn in front")
        prompt = self.renderer.render(conversation.upto(index), add_generation_prompt=True)
        is_last = index == len(messages) - 1
        text = whole if is_last else self.renderer.render(conversation.upto(index + 1))
        if not text.startswith(prompt):
            text = self._served_text(prompt, text, conversation, index)
        after = len(self.end.rest) if text.endswith(self.end.trained + self.end.rest) else 0
        if self.end.borrowed and not (self.end.trained and text.endswith(self.end.trained + self.end.rest)):
            follows = "tool" if messages[index].get("tool_calls") else "user"
            borrowed = self.end.borrowed.get(follows, "")
            text += borrowed if is_last or whole.startswith(text + borrowed) or not whole.startswith(text) else ""
        return _Turn(text, len(prompt), len(text) - after, index)

    def _served_text(self, prompt: str, rendered: str, conversation: Conversation, index: int) -> str:
        """The text of a turn that the template renders otherwise than it serves it: its prompt, and what the turn adds to that."""
        message, opening = conversation.messages[index], self.opening
        base = prompt.removesuffix(opening) if opening else prompt
        text = self._opened(prompt, rendered[len(base) :], message) if opening and rendered.startswith(base) else None
        if text is None and not (_text(message).strip() or message.get("tool_calls") or message.get("reasoning_content")):
            text = prompt + self.end.trained + self.end.rest  # nothing is said: all that is left to write is the end
        if text is None:
            text = self._after_header(prompt, rendered, conversation, index)
        if text is not None:
            return text
        hint = "mend the template, or give another one with --template"
        if "enable_thinking" in self.renderer.text:
            hint = "check enable_thinking against the rows"
        if opening and len(opening) <= _LONGEST_OPENING:
            hint = f"begin every assistant content with {opening!r}, which the model's prompt opens"
        raise DataError(f"messages[{index}], an assistant turn, does not begin where its served prompt ends: {difference(prompt, rendered)}; {hint}")

    def _opened(self, prompt: str, rest: str, message: Message) -> str | None:
        """A turn whose prompt opens the answer (``<think>``) although the template leaves this out of the rendered turn, which is `rest`."""
        content, reasoning, opening = _text(message), message.get("reasoning_content"), self.opening
        thinks = opening.strip() == "<think>"
        close = "\n</think>\n\n" if opening.endswith("\n") else "</think>"
        if thinks and isinstance(reasoning, str) and not content.startswith(opening):
            content = f"{opening}{reasoning.strip()}{close}{content.lstrip()}"
        if thinks and isinstance(reasoning, str) and message.get("tool_calls") and not rest.startswith("</think>") and reasoning.strip() not in rest:
            return f"{prompt}{reasoning.strip()}{close}{rest}"
        if content.startswith(opening):
            return None if message.get("tool_calls") else prompt + content[len(opening) :] + self.end.trained + self.end.rest
        if not thinks or not self.add_non_thinking_prefix:
            return None
        return prompt + rest if rest.startswith("</think>") else prompt + close + rest

    def _after_header(self, prompt: str, rendered: str, conversation: Conversation, index: int) -> str | None:
        """A turn before which the template writes other things than in its prompt (Mistral's system prompt): the prompt, and the turn's content.

        Where the content begins is known from rendering the turn with two other contents; prompt and turn have to open it in the same way.
        """
        before = conversation.upto(index)
        probes = [
            self.renderer.render(Conversation([*before.messages, {"role": "assistant", "content": content}], before.tools, before.kwargs))
            for content in ("a", "b")
        ]
        header = common_prefix(*probes)
        opens = prompt.removeprefix(self.renderer.render(before))
        for head in (header, header.rstrip()):
            alike = common_prefix(prompt[::-1], head[::-1])
            if rendered.startswith(head) and alike and len(alike) >= len(opens):
                return prompt + rendered[len(head) :]
        return None

    def _want_one(self, plans: list[Plan], turns: list[_Turn], whole: str) -> None:
        rewritten = next((turn for turn in turns if not whole.startswith(turn.text[: turn.end])), None)
        if rewritten is not None and len(plans) > 1:
            reason = "--loss_scale all trains whole rows only" if self.loss_scale.base == "all" else "encode it with encode_rows"
            raise DataError(
                f"the chat template rewrites earlier turns, so one row cannot hold this conversation: {difference(rewritten.text, whole)}; {reason}"
            )


def difference(served: str, rendered: str, width: int = 40) -> str:
    """The first place where two texts differ, with a little of each."""
    at = len(common_prefix(served, rendered))
    before = served[max(0, at - 20) : at]
    return f"after {before!r} there is {served[at : at + width]!r} in serving and {rendered[at : at + width]!r} in the whole"


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(block.get("text", "")) for block in content)
    return content if isinstance(content, str) else ""
