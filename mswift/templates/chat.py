"""The checkpoint's own chat template: what a model is trained on and what it is served with come from this one place.

Where the template has ``{% generation %}`` blocks they say which tokens are trained. Everywhere else the mask comes from rendering (see
`mswift.templates.plan`), and nothing is ever found by looking for a string in the text.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mswift.errors import DataError, one_line
from mswift.log import get_logger
from mswift.templates.bulk import Bools, Rows, assemble, weigh_rows
from mswift.templates.conversation import Conversation, Encoded, EncodedChunk, Message, Tool
from mswift.templates.forms import Form, Forms
from mswift.templates.loss_scale import LossScale, parse_loss_scale
from mswift.templates.plan import Plan, Planner, TurnEnd
from mswift.templates.renderer import Renderer
from mswift.templates.spans import Tokens, common_prefix, find_end, find_start
from mswift.templates.tool_calls import Parsed, find_format, parse_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CACHED_PIECE = 512  # characters; a longer piece of prompt is a conversation rather than a part of the template
_MAX_CACHED_PIECES = 1024
_IN_FLIGHT = 2  # batches in the tokenizer while the next one is rendered: one of them hands its tokens over, the other keeps the cores busy

logger = get_logger("mswift.templates.chat")


@dataclass(slots=True)
class _Batch:
    """Conversations of one chunk on their way.

    Args:
        forms, plans: by number of the conversation, each in one of them. texts: of those with a form.
    """

    conversations: Sequence[Conversation]
    forms: dict[int, Form] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    plans: dict[int, list[Plan] | DataError] = field(default_factory=dict)


class ChatTemplate:
    """Renders and tokenises conversations with a Jinja chat template.

    Wherever a conversation is taken it may be a `Conversation` (with tools), or a list of messages.

    Args:
        tokenizer: a fast tokenizer (`PreTrainedTokenizerFast`) that carries a chat template.
        system: system prompt for conversations that bring none; ``None`` leaves it to the template, ``""`` is an empty one.
        loss_scale: ``default`` trains every assistant turn, ``last_round`` those after the last user turn, ``all`` every token; with
            strategies after it, as `parse_loss_scale` reads them. A message with ``"loss": false`` is not trained, one with
            ``"loss": true`` is, and ``"loss_scale"`` is the weight of a turn.
        enable_thinking: handed to the template where not ``None``.
        chat_template: a Jinja text that replaces the tokenizer's own.
        stop_words: texts that end a generated turn beside the template's own end.
        add_non_thinking_prefix: where the prompt opens the reasoning (``<think>``) and a turn has none, close it again; else an error.
        agent_template: name of the dialect in which tools are written, for templates that write none.

    Raises:
        DataError: there is no chat template, it is not valid Jinja, it takes no system prompt though one is set, or the tokenizer is
            not a fast one. ConfigError: the loss scale is unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        system: str | None = None,
        loss_scale: str | LossScale = "default",
        enable_thinking: bool | None = None,
        chat_template: str | None = None,
        stop_words: Sequence[str] = (),
        add_non_thinking_prefix: bool = True,
        agent_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.template_text = chat_template or _own_template(tokenizer)
        settings: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._settings, self._agent_template = settings, agent_template
        if settings and "enable_thinking" not in self.template_text:
            logger.warning("enable_thinking has no effect: the chat template of %s does not use it", _name(tokenizer))
        self.renderer = Renderer.of(tokenizer, self.template_text, settings, agent_template)
        dialect = self.renderer.dialect
        self.stop_words = (*stop_words, *(dialect.stop_words if dialect is not None else ()))
        self._added_ids = frozenset(tokenizer.get_added_vocab().values()) | frozenset(tokenizer.all_special_ids)
        self._pieces: dict[str, list[int]] = {}
        self._turn_end, opening = self._probe()
        self.loss_scale = parse_loss_scale(loss_scale) if isinstance(loss_scale, str) else loss_scale
        self._planner = Planner(self.renderer, self._turn_end, opening, self.loss_scale, add_non_thinking_prefix=add_non_thinking_prefix)
        self._forms = Forms(self.renderer, self._planner, system, self._tokenise, self._added_ids, tokenizer)
        self._confirmed: dict[Form, bool] = {}
        self._is_added = np.zeros(max(len(tokenizer), *(token + 1 for token in self._added_ids), tokenizer.vocab_size), np.bool_)
        self._is_added[list(self._added_ids)] = True
        if system is not None:
            self._check_system()

    # ---- the public face -------------------------------------------------------------------------------------------------------------

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a generated turn: the tokenizer's eos, the template's end-of-turn token and stop words of one token, ascending."""
        ends = {self.tokenizer.eos_token_id}
        for text in (self._turn_end.trained, *self._turn_end.borrowed.values(), *self.stop_words):
            ids = [token for token in self._tokenise([text])[0].ids if token in self._added_ids] if text else []
            ends.update(ids[:1])
        called = self.renderer.probe_call()
        last = self._tokenise([called.rstrip()])[0].ids[-1:] if called and not self._turn_end.borrowed else []
        ends.update(token for token in last if token in self._added_ids)
        return sorted(token for token in ends if token is not None)

    @property
    def end_token(self) -> str | None:
        """The token among `end_of_turn`; None where a turn ends without one of its own."""
        ids = self._tokenise([self._turn_end.trained])[0].ids if self._turn_end.trained else []
        found = next((token for token in ids if token in self._added_ids), None)
        return None if found is None else str(self.tokenizer.convert_ids_to_tokens(found))

    @property
    def end_of_turn(self) -> str:
        """The text that the template writes to end an assistant turn, such as ``<|im_end|>``; empty where it writes none."""
        return self._turn_end.trained

    def identity(self) -> dict[str, str]:
        """Digests of all that the tokens of a conversation depend on, by what a user would call it."""
        parts = {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "chat template": self.template_text,
            "setting of the template (system, loss_scale, enable_thinking)": repr(
                (self.system, self.loss_scale, self._settings, self._planner.add_non_thinking_prefix)
            ),
        }
        if self._agent_template is not None:
            parts["agent template"] = self._agent_template
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in parts.items()}

    def render(self, conversation: Conversation | Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation as the template writes it. Raises `DataError` where the template refuses it."""
        return self.renderer.render(Conversation.of(conversation), add_generation_prompt=add_generation_prompt)

    def encode_prompt(self, conversation: Conversation | Sequence[Message]) -> list[int]:
        """Token ids that a served model gets for a conversation, up to the place where its answer begins."""
        prepared = self.renderer.prepare(Conversation.of(conversation), self.system)
        return self._tokenise([self.renderer.render(prepared, add_generation_prompt=True)])[0].ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens as it is, special tokens included."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def parse(self, token_ids: Sequence[int], tools: Sequence[Tool] = ()) -> Parsed:
        """A generated turn as text and tool calls, by the format in which this template writes calls; its end is left out."""
        ids, ends = list(token_ids), self.stop_token_ids
        while ids and ids[-1] in ends:
            ids.pop()
        dialect = self.renderer.dialect
        name = find_format(self.template_text) if dialect is None else dialect.form
        return parse_answer(self.decode(ids), name, tools) if name else Parsed(self.decode(ids), ())

    def encode(self, conversation: Conversation | Sequence[Message]) -> Encoded:
        """A conversation as one row; its ids equal ``apply_chat_template(messages, tokenize=True)``.

        Weights are above 0.0 on what the assistant writes, its end-of-turn token included, and 0.0 elsewhere. Should a token reach over
        the end of the prompt (content that begins with a newline, with some tokenizers), it belongs to the prompt here and is not trained;
        `encode_rows` does better. Where a template ends no turn (GLM-4), the token that the model stops with follows the last turn.

        Raises:
            DataError: the template refuses or ignores a turn, there is no assistant turn to train, or the template rewrites earlier
                turns, so that one row cannot show every turn as it is served (use `encode_rows`).
        """
        plan = self._planner.plan(self.renderer.prepare(Conversation.of(conversation), self.system), one_row=True)[0]
        return self._weigh(plan, self._tokenise([plan.text])[0])[0]

    def encode_rows(self, conversation: Conversation | Sequence[Message]) -> list[Encoded]:
        """A conversation as training rows, each of which trains a turn exactly from where its served prompt ends.

        That is one row, equal to `encode`, for nearly every template and conversation. It is several, and each turn is trained in one
        of them, where

        * the template rewrites earlier turns (thinking models drop earlier reasoning): the row of turn i begins with
          ``apply_chat_template(messages[:i + 1])``, and later turns stand in it as long as they leave that as it is;
        * the served prompt opens the answer itself (``<think>``) but the rendered turn lacks it: the row is the served prompt and the
          message's content after this opening;
        * a token of the whole text reaches over the end of the prompt: prompt and answer are tokenised apart, as they are in serving.

        Raises:
            DataError: as `encode`, or the rendered turn does not begin with the prompt that it would be served with.
        """
        result = self.encode_batch([conversation])[0]
        if isinstance(result, DataError):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Conversation | Sequence[Message]]) -> list[list[Encoded] | DataError]:
        """`encode_rows` of many conversations with one call of the tokenizer; the error in place of the rows where one cannot be encoded."""
        plans = [self._try_plan(Conversation.of(conversation)) for conversation in conversations]
        return self._finish_all(plans, self._tokenise(_texts(plans)))

    def encode_chunks(self, batches: Iterable[Sequence[Conversation]]) -> Iterator[EncodedChunk]:
        """`encode_batch` of one batch after the other, as arrays.

        The tokenizer, which needs no interpreter, works on one batch while the next is rendered, and conversations of a known form
        (`mswift.templates.forms`) are rendered and weighed without running the template.
        """
        with ThreadPoolExecutor(_IN_FLIGHT, "mswift-tokenise") as threads:
            waiting: deque[tuple[_Batch, Future[tuple[list[Any], list[Tokens]]]]] = deque()
            for conversations in batches:
                batch = self._sorted(conversations)
                waiting.append((batch, threads.submit(self._tokenise_batch, batch)))
                if len(waiting) > _IN_FLIGHT:
                    yield self._chunk(*waiting.popleft())
            while waiting:
                yield self._chunk(*waiting.popleft())

    def _sorted(self, conversations: Sequence[Conversation]) -> _Batch:
        batch = _Batch(conversations)
        for number, conversation in enumerate(conversations):
            form = self._forms.of(conversation)
            if form is None:
                batch.plans[number] = self._try_plan(conversation)
            else:
                batch.forms[number] = form
                batch.texts.append(form.text(conversation.messages))
        return batch

    def _tokenise_batch(self, batch: _Batch) -> tuple[list[Any], list[Tokens]]:
        """Of the conversations with a form the encodings, without places in the text; of the others with them."""
        slow = self._tokenise(_texts(batch.plans.values()))
        return self._backend().encode_batch_fast(batch.texts, add_special_tokens=False), slow

    def _chunk(self, batch: _Batch, future: Future[tuple[list[Any], list[Tokens]]]) -> EncodedChunk:
        encodings, tokens = future.result()
        numbers = list(batch.forms)
        rows, holds = weigh_rows((encoding.ids for encoding in encodings), list(batch.forms.values()), self._is_added)
        self._confirm(batch, rows, holds)
        slow = dict(zip(batch.plans, self._finish_all(list(batch.plans.values()), tokens), strict=True))
        failed = [numbers[row] for row in np.flatnonzero(~holds)]
        slow |= dict(zip(failed, self.encode_batch([batch.conversations[number] for number in failed]), strict=True))
        return assemble(rows, holds, numbers, slow)

    def _confirm(self, batch: _Batch, rows: Rows, holds: Bools) -> None:
        """The first row of every form is made the general way too; where that gives another one, no row of the form holds."""
        for row, (number, form) in enumerate(batch.forms.items()):
            if form not in self._confirmed and holds[row]:
                made, end = self.encode_batch([batch.conversations[number]])[0], int(rows.lengths[: row + 1].sum())
                part = slice(end - int(rows.lengths[row]), end)
                self._confirmed[form] = made == [Encoded(rows.ids[part].tolist(), rows.weights[part].tolist())]
                if not self._confirmed[form]:
                    turns = ", ".join(form.roles)
                    logger.warning(
                        "%s: conversations of %s do not fit their form and are made one by one, which is slower", _name(self.tokenizer), turns
                    )
            if not self._confirmed.get(form, True):
                holds[row] = False

    def _finish_all(self, plans: list[list[Plan] | DataError], tokens: list[Tokens]) -> list[list[Encoded] | DataError]:
        left = iter(tokens)
        return [made if isinstance(made, DataError) else self._finish(made, left) for made in plans]

    # ---- what the template writes around an answer -----------------------------------------------------------------------------------

    def _probe(self) -> tuple[TurnEnd, str]:
        """Renders one-turn conversations that differ in the answer alone: what is written after it, and what the prompt opens before it."""
        question = [{"role": "user", "content": "x"}]
        first, second = (self.render([*question, {"role": "assistant", "content": answer}]) for answer in ("a", "b"))
        if first == second:
            raise DataError(f"the chat template of {_name(self.tokenizer)} does not write what the assistant says; give one for chat")
        tail = common_prefix(first[::-1], second[::-1])[::-1]
        prompt = self.render(question, add_generation_prompt=True)
        at = len(common_prefix(prompt, first))
        return self._split_tail(tail), prompt[at - prompt[:at].endswith("<") * (at < len(prompt)) :]

    def _split_tail(self, tail: str) -> TurnEnd:
        end = self._first_added(tail)
        if end is not None:
            return TurnEnd(tail[:end], tail[end:])
        borrowed = {role: text for role in ("user", "tool") if (text := self._next_opening(role))}
        if not borrowed:
            logger.warning(
                "the chat template of %s ends an assistant turn without a special token: the model cannot learn to stop", _name(self.tokenizer)
            )
        return TurnEnd(tail, "", borrowed)

    def _next_opening(self, role: str) -> str:
        """What follows an assistant turn up to the token that opens the turn of another role; empty where that is no special token."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        turns: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}, {"role": role, "content": "y"}]
        if role == "tool":
            turns[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            before, after = self.render(turns[:2]), self.render(turns)
        except DataError:
            return ""
        end = self._first_added(after[len(before) :]) if after.startswith(before) else None
        opening = after[len(before) :][:end] if end is not None else ""
        return opening if opening.lstrip() and self._first_added(opening.lstrip()) == self._tokenise([opening.lstrip()])[0].chars(0)[1] else ""

    def _first_added(self, text: str) -> int | None:
        """The end of the first added token of a text; None where it has none."""
        tokens = self._tokenise([text])[0] if text else Tokens([], None)
        return next((tokens.chars(i)[1] for i, token in enumerate(tokens.ids) if token in self._added_ids), None)

    def _check_system(self) -> None:
        """Refuses a system prompt that the template refuses or leaves out."""
        try:
            takes_none = "it ignores system turns" if self.renderer.ignores("system") else ""
            self.render([{"role": "system", "content": self.system}, {"role": "user", "content": "x"}])
        except DataError as error:
            takes_none = str(error)
        if takes_none:
            raise DataError(
                f"--system is set, but the chat template of {_name(self.tokenizer)} takes no system prompt ({takes_none}); "
                "leave --system out, or put its text into the first user turn"
            )

    # ---- the mask, on the level of tokens --------------------------------------------------------------------------------------------

    def _tokenise(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        return [Tokens(encoding.ids, encoding) for encoding in self._backend().encode_batch(texts, add_special_tokens=False)]

    def _backend(self) -> Any:
        backend = self.tokenizer.backend_tokenizer
        if backend.padding is not None or backend.truncation is not None:  # left there by whoever used it before
            backend.no_padding()
            backend.no_truncation()
        return backend

    def _piece_ids(self, piece: str) -> list[int]:
        """Ids of a piece of prompt that begins with an added token (or with the text); the same few pieces come back in every row."""
        known = self._pieces.get(piece)
        if known is None:
            known = self._tokenise([piece])[0].ids
            if len(piece) <= _CACHED_PIECE and len(self._pieces) < _MAX_CACHED_PIECES:
                self._pieces[piece] = known
        return known

    def _weigh(self, plan: Plan, tokens: Tokens) -> tuple[Encoded, bool]:
        """The row, and whether each trained range begins exactly where the tokenised prompt before it ends."""
        weights = [0.0] * len(tokens.ids)
        all_aligned = True
        before = -1
        for start, end, weight in plan.spans:
            if start == before:  # goes on with the same answer: a token belongs to the part that it begins in
                first = find_end(tokens, start)
            else:
                first, aligned = find_start(tokens, plan.text, start, self._added_ids, self._piece_ids)
                all_aligned &= aligned
            last = find_end(tokens, end)
            weights[first:last] = [weight] * (last - first)
            before = end
        return Encoded(tokens.ids, weights), all_aligned

    def _try_plan(self, conversation: Conversation) -> list[Plan] | DataError:
        try:
            return self._planner.plan(self.renderer.prepare(conversation, self.system))
        except DataError as error:
            return error

    def _finish(self, plans: Sequence[Plan], tokens: Iterator[Tokens]) -> list[Encoded]:
        rows: list[Encoded] = []
        for plan in plans:
            row, aligned = self._weigh(plan, next(tokens))
            rows += [row] if aligned else self._apart(plan)
        return rows

    def _apart(self, plan: Plan) -> list[Encoded]:
        """A row for each answer, with prompt and answer tokenised apart."""
        rows = []
        answers: list[list[tuple[int, int, float]]] = []
        for span in plan.spans:
            if answers and answers[-1][-1][1] == span[0]:
                answers[-1].append(span)
            else:
                answers.append([span])
        for answer in answers:
            start, end = answer[0][0], answer[-1][1]
            prompt, written = self._tokenise([plan.text[:start], plan.text[start:end]])
            weights = [0.0] * len(written.ids)
            for first, last, weight in answer:
                part = slice(find_end(written, first - start), find_end(written, last - start))
                weights[part] = [weight] * (part.stop - part.start)
            rows.append(Encoded(prompt.ids + written.ids, [0.0] * len(prompt.ids) + weights))
        return rows


def _texts(plans: Iterable[list[Plan] | DataError]) -> list[str]:
    return [plan.text for made in plans if not isinstance(made, DataError) for plan in made]


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    if not tokenizer.is_fast:
        raise DataError(f"{_name(tokenizer)} has no fast tokenizer, which is needed to locate turns; add its tokenizer.json")
    if not tokenizer.chat_template:
        raise DataError(
            f"{_name(tokenizer)} has no chat template; take the chat (Instruct) model, give --template NAME (such as chatml), "
            "or put a chat_template.jinja into its directory"
        )
    try:
        text: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"{_name(tokenizer)}: {one_line(error)}") from error
    return text


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.name_or_path or "the tokenizer"
