"""Conversations of one form: the same roles, other contents. The template is run once for a form, and every other conversation of it is its text
with other contents put in; where the trained ranges lie is counted in added tokens, which are found in the ids of many rows at once.

A form is made only where that is exact: the template does nothing with contents but write them (`mswift.templates.content_use`), each answer begins
where its served prompt ends and stands in one text with all others, and ends with an added token. What a form cannot promise for every content is
looked at in the ids of each row (`mswift.templates.bulk`). All else goes the general way.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from mswift.errors import DataError
from mswift.templates.content_use import ContentUse, Trim, content_use
from mswift.templates.conversation import Conversation, Message
from mswift.templates.environment import parse_template
from mswift.templates.plan import Plan, Planner
from mswift.templates.renderer import Renderer
from mswift.templates.spans import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_OPEN, _CLOSE = "\ufdd2", "\ufdd3"  # noncharacters: no template has them
_HOLE = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_AROUND = "\n \t"  # what stands around a content to see how it is trimmed, beside the characters that the template names
_MAX_FORMS = 256
_PLAIN_KEYS = {"role", "content"}
Tokenise: TypeAlias = Callable[[list[str]], list[Tokens]]


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A trained range, counted in the added tokens of a row.

    Args:
        anchor: the last added token before the range. prompt: the ids from there to where the range begins. end: the added token that ends it.
    """

    anchor: int
    prompt: tuple[int, ...]
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """Conversations of one form; each is equal to itself only.

    Args:
        roles: of its messages. head: the ids that every such conversation begins with, up to the last added token before its first content.
        pieces: the text between contents, without that of the head. holes: which message stands between two of them, and how it is trimmed.
        added: the added tokens of the text, in order, those of the head too. spans: trained ranges.
    """

    roles: tuple[str, ...]
    head: list[int]
    pieces: tuple[str, ...]
    holes: tuple[tuple[int, Trim | None], ...]
    added: tuple[int, ...]
    spans: tuple[TokenSpan, ...]

    def text(self, messages: Sequence[Message]) -> str:
        """The text of a conversation of this form after its head."""
        parts = [self.pieces[0]]
        for (index, trim), piece in zip(self.holes, self.pieces[1:], strict=True):
            content = messages[index]["content"]
            parts += (content if trim is None else _trimmed(content, trim), piece)
        return "".join(parts)


class Forms:
    """Finds the form of conversations.

    Args:
        planner: where the trained ranges of a text are. system: put in front of conversations that bring no system prompt.
        tokenise: texts to tokens. added: ids of the added tokens. tokenizer: whose they are.
    """

    def __init__(
        self, renderer: Renderer, planner: Planner, system: str | None, tokenise: Tokenise, added: Set[int], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.renderer, self.planner, self.system, self.tokenise = renderer, planner, system, tokenise
        self.added, self.trained_end = added, planner.end.trained
        backend = tokenizer.backend_tokenizer
        known = backend.get_added_tokens_decoder()
        self._texts = {token: one.content for token, one in known.items()}
        self._fickle = {token for token, one in known.items() if one.single_word or one.lstrip or (one.normalized and backend.normalizer is not None)}
        self._use: ContentUse | None = None
        self._read = False
        self._known: dict[tuple[str, ...], Form | None] = {}

    def of(self, conversation: Conversation) -> Form | None:
        """The form of a conversation; None where it goes the general way."""
        use = self.use
        if use is None or conversation.tools or conversation.kwargs:
            return None
        roles = []
        for message in conversation.messages:
            content = message.get("content")
            if message.keys() != _PLAIN_KEYS or type(content) is not str or (use.questions and not use.is_plain(content)):
                return None
            roles.append(message["role"])
        key = tuple(roles)
        if key not in self._known:
            if len(self._known) >= _MAX_FORMS:
                return None
            try:
                self._known[key] = self._make(key)
            except (DataError, _NoFormError):
                self._known[key] = None
        return self._known[key]

    @property
    def use(self) -> ContentUse | None:
        """What the template does with contents; None where it may look into them, or where weights depend on what an answer says."""
        if not self._read:
            self._read = True
            scale = self.planner.loss_scale
            if not scale.strategies and scale.base != "all" and self.trained_end:
                self._use = content_use(parse_template(self.renderer.text))
            if self._use is not None and self.system is not None and not self._use.is_plain(self.system):
                self._use = None
        return self._use

    def _make(self, roles: Sequence[str]) -> Form:
        """The form of conversations of these roles; `_NoFormError` where there is none."""
        assert self.use is not None
        around = _AROUND + "".join(sorted({char for _, text in self.use.trims for char in text or "" if char not in _AROUND}))
        bare, padded = ([f"{pad}{_OPEN}{i}{_CLOSE}{pad[::-1]}" for i in range(len(roles))] for pad in ("", around))
        plans = [self._plan(roles, contents) for contents in (bare, padded)]
        text = plans[0].text
        pieces = _HOLE.split(text)
        numbers = [int(number) for number in pieces[1::2]]
        holes = tuple(zip(numbers, self._trims(plans[1].text, pieces[::2], numbers, padded), strict=True))
        added, spans = self._spans(plans[0])
        if self._spans(plans[1]) != (added, spans) or any(self._is_in_danger(token) for token in set(added)):
            raise _NoFormError
        cut, head = self._head(text, pieces[0])
        return Form(tuple(roles), head, (pieces[0][cut:], *pieces[2::2]), holes, added, spans)

    def _head(self, text: str, first: str) -> tuple[int, list[int]]:
        """Where the head of a text ends, and its ids. Added tokens cut a text into parts that are tokenised apart, so it may stand alone."""
        tokens = self.tokenise([text])[0]
        begins = [(tokens.chars(i)[0], i) for i, token in enumerate(tokens.ids) if token in self.added and tokens.chars(i)[1] <= len(first)]
        at, number = begins[-1] if begins else (0, 0)
        head, rest = self.tokenise([text[:at], text[at:]])
        return (at, head.ids) if head.ids == tokens.ids[:number] and rest.ids == tokens.ids[number:] else (0, [])

    def _plan(self, roles: Sequence[str], contents: Sequence[str]) -> Plan:
        """The one row of a conversation, of which every answer begins where its served prompt ends."""
        made = Conversation([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
        conversation = self.renderer.prepare(made, self.system)
        plans = self.planner.plan(conversation)
        text = self.renderer.render(conversation)
        if len(plans) > 1 or plans[0].text != text:
            raise _NoFormError
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"][-len(plans[0].spans) :]
        for index, (start, end, weight) in zip(turns, plans[0].spans, strict=True):
            prompt = self.renderer.render(conversation.upto(index), add_generation_prompt=True)
            turn = self.renderer.render(conversation.upto(index + 1))
            if weight != 1.0 or text[:start] != prompt or not text.startswith(turn) or not text[start:end].endswith(self.trained_end):
                raise _NoFormError
        return plans[0]

    def _trims(self, text: str, pieces: Sequence[str], numbers: Sequence[int], contents: Sequence[str]) -> list[Trim | None]:
        """How each content is trimmed where it is written; exactly one way explains the text."""
        assert self.use is not None
        ways: list[Trim | None] = [None, *sorted(self.use.trims, key=repr)]
        if not text.startswith(pieces[0]):
            raise _NoFormError
        at, found = len(pieces[0]), list[Trim | None]()
        for number, piece in zip(numbers, pieces[1:], strict=True):
            written = {way: (contents[number] if way is None else _trimmed(contents[number], way)) + piece for way in ways}
            fitting = [way for way, part in written.items() if text.startswith(part, at)]
            if len(set(written.values())) < len(ways) or len(fitting) != 1:
                raise _NoFormError
            found.append(fitting[0])
            at += len(written[fitting[0]])
        if at != len(text):
            raise _NoFormError
        return found

    def _spans(self, plan: Plan) -> tuple[tuple[int, ...], tuple[TokenSpan, ...]]:
        """The added tokens of a text, and its trained ranges counted in them."""
        tokens = self.tokenise([plan.text])[0]
        places = [i for i, token in enumerate(tokens.ids) if token in self.added]
        spans = []
        for start, end, _ in plan.spans:
            ends = [n for n, i in enumerate(places) if tokens.chars(i)[1] == end]
            before = [n for n, i in enumerate(places) if tokens.chars(i)[1] <= start]
            if not ends or not before:
                raise _NoFormError
            begin = tokens.chars(places[before[-1]])[0]
            if _OPEN in plan.text[begin:start]:
                raise _NoFormError
            spans.append(TokenSpan(before[-1], tuple(self.tokenise([plan.text[begin:start]])[0].ids), ends[0]))
        for earlier, later in itertools.pairwise(spans):
            if later.anchor < earlier.end:
                raise _NoFormError
        return tuple(tokens.ids[i] for i in places), tuple(spans)

    def _is_in_danger(self, token: int) -> bool:
        """Whether another added token could be found over the beginning of this one, so that this one is not found where the template writes it."""
        mine = self._texts.get(token, "")
        beginnings = tuple(mine[:i] for i in range(1, len(mine)))
        others = (other for other in self._texts.values() if other.endswith(beginnings) or (other != mine and other.startswith(mine)))
        return not mine or token in self._fickle or any(others)


class _NoFormError(Exception):
    """Conversations of these roles go the general way."""


def _trimmed(content: str, trim: Trim) -> str:
    way, characters = trim
    if way == "strip":
        return content.strip(characters)
    return content.lstrip(characters) if way == "lstrip" else content.rstrip(characters)
