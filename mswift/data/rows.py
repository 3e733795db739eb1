"""From whatever shape a row has to messages, with every fault named by file, line and field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from mswift.data.sources import RawRow
from mswift.errors import DataError
from mswift.log import get_logger

Message: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_ANSWER_FIELDS = ("output", "response")

logger = get_logger("mswift.data.rows")


@dataclass(frozen=True, slots=True)
class Row:
    """A normalised row: its messages (``role``, ``content`` and what else a message had), its other columns, and its place."""

    messages: list[Message]
    columns: dict[str, Any]
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


def normalise(raw: RawRow, columns: Mapping[str, str] | None = None, *, require_assistant: bool = True) -> Row:
    """Turns one raw row into messages.

    Shapes: ``messages``; alpaca (``instruction``, ``input``, ``output``); ``query`` and ``response``. The last two also take ``system`` and
    ``history`` (a list of ``[question, answer]`` pairs), and ``system`` goes in front of ``messages`` that have none. All other columns are kept.

    Args:
        columns: renames columns before the shape is looked at, old name to new; names that the row lacks are passed over.
        require_assistant: whether a row without an assistant turn is wrong (training) or a prompt (inference).

    Raises:
        DataError: with file, line, the field at fault and what was got.
    """
    data = {(columns or {}).get(name, name): value for name, value in raw.data.items()}
    if "messages" in data:
        messages = _check_messages(raw, data.pop("messages"))
    elif "instruction" in data:
        messages = _from_fields(raw, data, "instruction", "output", require_assistant)
    elif "query" in data:
        messages = _from_fields(raw, data, "query", "response", require_assistant)
    else:
        _fail(raw, f"got the columns {_names(data)}, wanted messages, instruction/input/output or query/response; map them with --columns")
    system = data.pop("system", None)
    if system is not None and not (messages and messages[0]["role"] in ("system", "developer")):
        messages.insert(0, {"role": "system", "content": _text(raw, "system", system)})
    if require_assistant and not any(message["role"] == "assistant" for message in messages):
        _fail(raw, f"no assistant turn to train on, got the roles {', '.join(m['role'] for m in messages) or '(none)'}; add one or remove the row")
    return Row(messages, data, raw.source, raw.line)


class BadRows:
    """Counts the rows that cannot be used, and decides whether there are too many.

    Args:
        strict: the first one is an error.
        max_share: more than this share of all rows is an error.
        num_shown: how many are listed.
    """

    def __init__(self, *, strict: bool = False, max_share: float = 0.01, num_shown: int = 3) -> None:
        self.strict, self.max_share, self.num_shown = strict, max_share, num_shown
        self.errors: list[str] = []

    def add(self, error: DataError) -> None:
        if self.strict:
            raise error
        self.errors.append(str(error))

    def finish(self, total: int) -> None:
        """Raises `DataError` where too many of ``total`` rows are bad; warns where some are."""
        if not self.errors:
            return
        more = len(self.errors) - self.num_shown
        listed = " | ".join(self.errors[: self.num_shown]) + (f" | and {more} more" if more > 0 else "")
        message = f"{len(self.errors)} of {total} rows cannot be used"
        if len(self.errors) > self.max_share * total:
            raise DataError(f"{message}, more than {self.max_share:.0%}: {listed}")
        logger.warning("%s and are left out: %s", message, listed)


def _check_messages(raw: RawRow, value: Any) -> list[Message]:
    if not isinstance(value, list):
        _fail(raw, f"messages is {_got(value)}, wanted a list of {{role, content}}")
    if not value:
        _fail(raw, "messages is an empty list, wanted at least a user and an assistant turn")
    return [_check_message(raw, f"messages[{i}]", message) for i, message in enumerate(value)]


def _check_message(raw: RawRow, field: str, message: Any) -> Message:
    if not isinstance(message, dict):
        _fail(raw, f"{field} is {_got(message)}, wanted an object with role and content")
    for key in ("role", "content"):
        if key not in message:
            _fail(raw, f"{field} has no {key}, got the keys {_names(message)}")
    role = message["role"]
    if role not in ROLES:
        _fail(raw, f"{field}.role is {_got(role)}, wanted one of {', '.join(ROLES)}")
    _text(raw, f"{field}.content", message["content"])
    for key, value in message.items():
        if isinstance(value, str):
            _text(raw, f"{field}.{key}", value)
    if not isinstance(message.get("loss"), (bool, type(None))):
        _fail(raw, f"{field}.loss is {_got(message['loss'])}, wanted true or false")
    return {key: value for key, value in message.items() if value is not None}


def _from_fields(raw: RawRow, data: dict[str, Any], question_field: str, answer_field: str, require_assistant: bool) -> list[Message]:
    messages: list[Message] = []
    for i, pair in enumerate(_history(raw, data.pop("history", None))):
        messages += _round(_text(raw, f"history[{i}][0]", pair[0]), _text(raw, f"history[{i}][1]", pair[1]))
    question = _text(raw, question_field, data.pop(question_field))
    extra = data.pop("input", None) if question_field == "instruction" else None
    if extra not in (None, ""):
        question = f"{question}\n{_text(raw, 'input', extra)}"
    if answer_field not in data and require_assistant:
        _fail(raw, f"{answer_field} is missing, got the columns {_names(raw.data)}")
    answer = data.pop(answer_field, None)
    if answer is None and not require_assistant:
        return [*messages, {"role": "user", "content": question}]
    return messages + _round(question, _text(raw, answer_field, answer))


def _history(raw: RawRow, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        _fail(raw, f"history is {_got(value)}, wanted a list of [question, answer] pairs")
    for i, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            _fail(raw, f"history[{i}] is {_got(pair)}, wanted a [question, answer] pair")
    return value


def _round(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(raw: RawRow, field: str, value: Any) -> str:
    if not isinstance(value, str):
        _fail(raw, f"{field} is {_got(value)}, wanted a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            _fail(raw, f"{field} holds half of a surrogate pair (a broken \\ud8.. escape), wanted whole characters; write the file as UTF-8")
    return value


def _fail(raw: RawRow, what: str) -> NoReturn:
    raise DataError(f"{raw.where}: {what}")


def _got(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with the keys {_names(value)}"
    return repr(value if not isinstance(value, str) or len(value) <= 40 else value[:37] + "...")


def _names(data: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in data) or "(none)"
