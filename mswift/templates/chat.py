"""The checkpoint's own chat template: what a model is trained on and what it is served with come from this one place.

Where the template has ``{% generation %}`` blocks they say which tokens are trained. Everywhere else the mask comes from rendering: the
prompt of an assistant turn is rendered as it would be served, the turn ends where rendering the conversation up to it ends, and nothing
is ever found by looking for a string in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from mswift.errors import DataError
from mswift.log import get_logger
from mswift.templates.spans import Tokens, common_prefix, find_end, find_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message: TypeAlias = dict[str, Any]
LossScale: TypeAlias = Literal["default", "last_round", "all"]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError)  # what a template or its rendering raises over messages it cannot take
_PLAIN_ROLES = frozenset({"user", "assistant"})
_CACHED_PIECE = 512  # characters; a longer piece of prompt is a conversation rather than a part of the template
_MAX_CACHED_PIECES = 1024

logger = get_logger("mswift.templates.chat")


@dataclass(slots=True)
class Encoded:
    """One training row: token ids, and for each token how much its prediction counts in the loss (0.0 = not trained)."""

    input_ids: list[int]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class _TurnEnd:
    """What a template writes after an assistant's content: ``trained`` through the end-of-turn token, then ``rest``."""

    trained: str
    rest: str
    token_id: int | None


@dataclass(frozen=True, slots=True)
class _Turn:
    """One assistant turn: the text with it as last turn, and where in this text the model would have written (characters)."""

    text: str
    start: int
    end: int


@dataclass(slots=True)
class _Plan:
    """A text to tokenise and the character ranges of it that are trained."""

    text: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """Renders and tokenises conversations with a tokenizer's Jinja chat template.

    Args:
        tokenizer: a fast tokenizer (`PreTrainedTokenizerFast`) that carries a chat template.
        system: system prompt for conversations that bring none; ``None`` leaves it to the template, ``""`` is an empty one.
        loss_scale: ``default`` trains every assistant turn, ``last_round`` those after the last user turn, ``all`` every token.
            A message with ``"loss": false`` is not trained under ``default`` and ``last_round``.
        enable_thinking: handed to the template where not ``None``.
        chat_template: a Jinja text that replaces the tokenizer's own.

    Raises:
        DataError: there is no chat template, it is not valid Jinja, it takes no system prompt though one is set, or the tokenizer is
            not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        system: str | None = None,
        loss_scale: LossScale = "default",
        enable_thinking: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.loss_scale = loss_scale
        self.template_text = chat_template or _own_template(tokenizer)
        self._kwargs: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if self._kwargs and "enable_thinking" not in self.template_text:
            logger.warning("enable_thinking has no effect: the chat template of %s does not use it", _name(tokenizer))
        self.has_generation_blocks = bool(_GENERATION_BLOCK.search(self.template_text))
        self._added_ids = frozenset(tokenizer.get_added_vocab().values()) | frozenset(tokenizer.all_special_ids)
        self._role_is_ignored: dict[str, bool] = {}
        self._pieces: dict[str, list[int]] = {}
        self._turn_end, self._opening = self._probe()
        if system is not None:
            self._check_system()

    # ---- the public face -------------------------------------------------------------------------------------------------------------

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a generated turn: the tokenizer's eos and the template's end-of-turn token, ascending."""
        eos = self.tokenizer.eos_token_id
        return sorted({token for token in (eos, self._turn_end.token_id) if token is not None})

    @property
    def end_of_turn(self) -> str:
        """The text that the template writes to end an assistant turn, such as ``<|im_end|>``; empty where it writes none."""
        return self._turn_end.trained

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation as the template writes it. Raises `DataError` where the template refuses it."""
        text: str = self._apply(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        return text

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that a served model gets for ``messages``, up to the place where its answer begins."""
        prepared = self._prepare(messages)
        return self._tokenise([self.render(prepared, add_generation_prompt=True)])[0].ids

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A conversation as one row; its ids equal ``apply_chat_template(messages, tokenize=True)``.

        Weights are 1.0 on what the assistant writes, its end-of-turn token included, and 0.0 elsewhere. Should a token reach over
        the end of the prompt (content that begins with a newline, with some tokenizers), it belongs to the prompt here and is not trained;
        `encode_rows` does better.

        Raises:
            DataError: the template refuses or ignores a turn, there is no assistant turn to train, or the template rewrites earlier
                turns, so that one row cannot show every turn as it is served (use `encode_rows`).
        """
        prepared = self._prepare(messages)
        plan = self._plan(prepared, one_row=True)[0]
        return self._weigh(plan, self._tokenise([plan.text])[0])[0]

    def encode_rows(self, messages: Sequence[Message]) -> list[Encoded]:
        """A conversation as training rows, each of which trains a turn exactly from where its served prompt ends.

        That is one row, equal to `encode`, for nearly every template and conversation. It is one row per trained assistant turn,
        with the conversation up to this turn, where

        * the template rewrites earlier turns (thinking models drop earlier reasoning): row i equals
          ``apply_chat_template(messages[:i + 1])``;
        * the served prompt opens the answer itself (``<think>``) but the rendered turn lacks it: the row is the served prompt and the
          message's content after this opening;
        * a token of the whole text reaches over the end of the prompt: prompt and answer are tokenised apart, as they are in serving.

        Raises:
            DataError: as `encode`, or the rendered turn does not begin with the prompt that it would be served with.
        """
        result = self.encode_batch([messages])[0]
        if isinstance(result, DataError):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Sequence[Message]]) -> list[list[Encoded] | DataError]:
        """`encode_rows` of many conversations with one call of the tokenizer; the error in place of the rows where one cannot be encoded."""
        plans = [self._try_plan(messages) for messages in conversations]
        tokens = iter(self._tokenise([plan.text for made in plans if not isinstance(made, DataError) for plan in made]))
        return [made if isinstance(made, DataError) else self._finish(made, tokens) for made in plans]

    # ---- rendering -------------------------------------------------------------------------------------------------------------------

    def _apply(self, messages: list[Message], **kwargs: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template_text, **self._kwargs, **kwargs)
        except _REFUSALS as error:
            raise _refused(self.tokenizer, messages, error) from error

    def _probe(self) -> tuple[_TurnEnd, str]:
        """Renders one-turn conversations that differ in the answer alone: what is written after it, and what the prompt opens before it."""
        question = [{"role": "user", "content": "x"}]
        first, second = (self.render([*question, {"role": "assistant", "content": answer}]) for answer in ("a", "b"))
        if first == second:
            raise DataError(f"the chat template of {_name(self.tokenizer)} does not write what the assistant says; give one for chat")
        tail = common_prefix(first[::-1], second[::-1])[::-1]
        prompt = self.render(question, add_generation_prompt=True)
        return self._split_tail(tail), prompt[len(common_prefix(prompt, first)) :]

    def _split_tail(self, tail: str) -> _TurnEnd:
        tokens = self._tokenise([tail])[0] if tail else Tokens([], None)
        for index, token in enumerate(tokens.ids):
            if token in self._added_ids:
                cut = tokens.chars(index)[1]
                return _TurnEnd(tail[:cut], tail[cut:], token)
        logger.warning(
            "the chat template of %s ends an assistant turn without a special token: the model cannot learn to stop", _name(self.tokenizer)
        )
        return _TurnEnd(tail, "", None)

    def _check_system(self) -> None:
        """Refuses a system prompt that the template refuses or leaves out."""
        try:
            takes_none = "it ignores system turns" if self._ignores("system") else ""
            self.render([{"role": "system", "content": self.system}, {"role": "user", "content": "x"}])
        except DataError as error:
            takes_none = str(error)
        if takes_none:
            raise DataError(
                f"--system is set, but the chat template of {_name(self.tokenizer)} takes no system prompt ({takes_none}); "
                "leave --system out, or put its text into the first user turn"
            )

    def _ignores(self, role: str) -> bool:
        """Whether the template leaves out what a turn of this role says; one that refuses the role does not ignore it."""
        if role not in self._role_is_ignored:
            user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
            turns = [{"role": role, "content": content} for content in ("a", "b")]
            first = role in ("system", "developer")
            try:
                texts = [self.render([turn, user] if first else [user, assistant, turn]) for turn in turns]
                self._role_is_ignored[role] = texts[0] == texts[1]
            except DataError:
                self._role_is_ignored[role] = False
        return self._role_is_ignored[role]

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with the system prompt in front; refuses turns that the template would silently leave out."""
        prepared = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self.system is not None and not (prepared and prepared[0].get("role") in ("system", "developer")):
            prepared = [{"role": "system", "content": self.system}, *prepared]
        for role in {str(message.get("role")) for message in prepared} - _PLAIN_ROLES:
            if self._ignores(role):
                raise DataError(f"the chat template of {_name(self.tokenizer)} ignores {role!r} turns; remove them or fold them into a user turn")
        return prepared

    # ---- the mask, on the level of text ----------------------------------------------------------------------------------------------

    def _trained_turns(self, messages: Sequence[Message]) -> list[int]:
        """Positions of the assistant turns that are trained; never empty."""
        first = 0
        if self.loss_scale == "last_round":
            first = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=0)
        turns = [i for i, m in enumerate(messages) if i >= first and m.get("role") == "assistant" and m.get("loss") is not False]
        if not turns:
            raise DataError("no assistant turn to train on; every training row needs one")
        return turns

    def _plan(self, messages: list[Message], *, one_row: bool = False) -> list[_Plan]:
        whole = self.render(messages)
        if self.loss_scale == "all":
            return [_Plan(whole, [(0, len(whole))])]
        trained = self._trained_turns(messages)
        marked = self._marked_plan(messages, trained) if self.has_generation_blocks else None
        if marked is not None:
            return [marked]
        turns = [self._turn(messages, i, whole) for i in trained]
        rewritten = next((turn for turn in turns if not whole.startswith(turn.text[: turn.end])), None)
        if rewritten is None:
            return [_Plan(whole, [(turn.start, turn.end) for turn in turns])]
        if one_row:
            raise DataError(
                f"the chat template rewrites earlier turns, so one row cannot hold this conversation: {_difference(rewritten.text, whole)}; "
                "encode it with encode_rows"
            )
        return [_Plan(turn.text, [(turn.start, turn.end)]) for turn in turns]

    def _marked_plan(self, messages: list[Message], trained: list[int]) -> _Plan | None:
        """The mask of the template's ``{% generation %}`` blocks; ``None`` where they are not one to an assistant turn."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, blocks = render_jinja_template(
                conversations=[messages],
                chat_template=self.template_text,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._kwargs},
            )
        except _REFUSALS as error:
            raise _refused(self.tokenizer, messages, error) from error
        assistants = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if len(blocks[0]) != len(assistants):
            return None
        spans = [(start, self._block_end(texts[0], start, end)) for start, end in blocks[0]]
        return _Plan(texts[0], [span for span, index in zip(spans, assistants, strict=True) if index in trained])

    def _block_end(self, text: str, start: int, end: int) -> int:
        """A block ends with the end-of-turn token, which the model must learn to write, and not with a newline after it."""
        trained, rest = self._turn_end.trained, self._turn_end.rest
        if text.startswith(trained, end):
            return end + len(trained)
        return end - len(rest) if text[start:end].endswith(trained + rest) else end

    def _turn(self, messages: list[Message], index: int, whole: str) -> _Turn:
        if index == 0:
            raise DataError("messages[0] is an assistant turn: nothing would be served before it; drop it or put a user turn in front")
        prompt = self.render(messages[:index], add_generation_prompt=True)
        text = whole if index == len(messages) - 1 else self.render(messages[: index + 1])
        tail = self._turn_end
        if not text.startswith(prompt):
            text = self._served_text(prompt, text, str(messages[index].get("content") or ""))
        after = len(tail.rest) if text.endswith(tail.trained + tail.rest) else 0
        return _Turn(text, len(prompt), len(text) - after)

    def _served_text(self, prompt: str, rendered: str, content: str) -> str:
        """The text of a turn whose prompt opens the answer (``<think>``) although the template leaves this out of the rendered turn."""
        if self._opening and content.startswith(self._opening):
            return prompt + content[len(self._opening) :] + self._turn_end.trained + self._turn_end.rest
        hint = "check enable_thinking against the rows"
        if self._opening:
            hint = f"begin every assistant content with {self._opening!r}, which the model's prompt opens"
        raise DataError(f"an assistant turn does not begin where its served prompt ends: {_difference(prompt, rendered)}; {hint}")

    # ---- the mask, on the level of tokens --------------------------------------------------------------------------------------------

    def _tokenise(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        out = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [Tokens(ids, encoding) for ids, encoding in zip(out["input_ids"], out.encodings, strict=True)]

    def _piece_ids(self, piece: str) -> list[int]:
        """Ids of a piece of prompt that begins with an added token (or with the text); the same few pieces come back in every row."""
        known = self._pieces.get(piece)
        if known is None:
            known = self._tokenise([piece])[0].ids
            if len(piece) <= _CACHED_PIECE and len(self._pieces) < _MAX_CACHED_PIECES:
                self._pieces[piece] = known
        return known

    def _weigh(self, plan: _Plan, tokens: Tokens) -> tuple[Encoded, bool]:
        """The row, and whether each trained range begins exactly where the tokenised prompt before it ends."""
        weights = [0.0] * len(tokens.ids)
        all_aligned = True
        for start, end in plan.spans:
            first, aligned = find_start(tokens, plan.text, start, self._added_ids, self._piece_ids)
            last = find_end(tokens, end)
            weights[first:last] = [1.0] * (last - first)
            all_aligned &= aligned
        return Encoded(tokens.ids, weights), all_aligned

    def _try_plan(self, messages: Sequence[Message]) -> list[_Plan] | DataError:
        try:
            return self._plan(self._prepare(messages))
        except DataError as error:
            return error

    def _finish(self, plans: Sequence[_Plan], tokens: Iterator[Tokens]) -> list[Encoded]:
        rows: list[Encoded] = []
        for plan in plans:
            row, aligned = self._weigh(plan, next(tokens))
            rows += [row] if aligned else [self._join(plan.text, start, end) for start, end in plan.spans]
        return rows

    def _join(self, text: str, start: int, end: int) -> Encoded:
        prompt, answer = (tokens.ids for tokens in self._tokenise([text[:start], text[start:end]]))
        return Encoded(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer))


def _refused(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], error: Exception) -> DataError:
    if isinstance(error, TemplateSyntaxError):
        where = "chat_template.jinja (or tokenizer_config.json)"
        return DataError(
            f"the chat template of {_name(tokenizer)} is broken at line {error.lineno}: {_one_line(str(error.message))}; mend it in its {where}"
        )
    roles = ", ".join(str(message.get("role")) for message in messages) or "(none)"
    return DataError(f"the chat template refused a conversation with the roles {roles}: {_one_line(str(error))}")


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    if not tokenizer.is_fast:
        raise DataError(f"{_name(tokenizer)} has no fast tokenizer, which is needed to locate turns; add its tokenizer.json")
    if not tokenizer.chat_template:
        raise DataError(f"{_name(tokenizer)} has no chat template; take the chat (Instruct) model, or put a chat_template.jinja into its directory")
    try:
        text: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"{_name(tokenizer)}: {_one_line(str(error))}") from error
    return text


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.name_or_path or "the tokenizer"


def _one_line(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _difference(served: str, rendered: str, width: int = 40) -> str:
    """The first place where two texts differ, with a little of each."""
    at = len(common_prefix(served, rendered))
    before = served[max(0, at - 20) : at]
    return f"after {before!r} there is {served[at : at + width]!r} in serving and {rendered[at : at + width]!r} in the whole"
