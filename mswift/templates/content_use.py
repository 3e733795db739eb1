"""What a chat template does with the contents of messages, read off its syntax: nothing but write them out, or look into them too.

A template that only writes contents (or trims them first) makes of all conversations of the same roles the same text around other contents, so
one rendering tells all of them (`mswift.templates.forms`). Questions that it asks of a content (``'</think>' in content``) are noted: a content
of which all of them are untrue is only written out too, and what the template would do otherwise is not looked at.

Anything that is not known to be harmless counts as looking into contents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from jinja2 import nodes

Kind: TypeAlias = Literal["none", "message", "content", "mixed"]
"""Of the value of an expression: no content in it; messages; a content as it is; a text with contents in it that may only be written."""
Question: TypeAlias = tuple[str, str]
"""``in``, ``startswith``, ``endswith``, ``eq`` or ``empty``, and the text that is asked about."""
Trim: TypeAlias = tuple[str, str | None]
"""A method of `str`, and its argument."""

_TRIMS = ("strip", "lstrip", "rstrip")
_OF_COLLECTIONS = frozenset((*dir(dict), *dir(list)))
_TYPE_TESTS = {"string": True, "none": False, "mapping": False, "number": False, "defined": True, "undefined": False}
_HARMLESS_CALLS = ("raise_exception", "namespace", "range")


class LooksInsideError(Exception):
    """The template does something with contents that is not known to be harmless."""


@dataclass(slots=True)
class ContentUse:
    """What a template asks of contents, and how it trims them where it writes them."""

    questions: set[Question] = field(default_factory=set)
    trims: set[Trim] = field(default_factory=set)

    def is_plain(self, content: str) -> bool:
        """Whether all questions about this content are answered with no."""
        return not any(_ANSWERS[what](content, text) for what, text in self.questions)


_ANSWERS = {
    "in": lambda content, text: text in content,
    "startswith": lambda content, text: content.startswith(text),
    "endswith": lambda content, text: content.endswith(text),
    "eq": lambda content, text: content == text,
    "empty": lambda content, text: not content,
}


def content_use(template: nodes.Template) -> ContentUse | None:
    """How a parsed template uses contents; None where it may look into them in other ways."""
    reader = _Reader()
    try:
        known = -1
        while known != reader.size():  # a name may be given a content further down, in a loop
            known = reader.size()
            reader.statements(template.body)
    except LooksInsideError:
        return None
    return reader.use


class _Reader:
    def __init__(self) -> None:
        self.use = ContentUse()
        self.names: dict[str, set[Kind]] = {"messages": {"message"}}
        self.macros: dict[str, nodes.Macro] = {}
        self.looped: set[str] = set()
        self.given: set[str] = set()

    def size(self) -> int:
        return (
            len(self.macros) + len(self.looped) + len(self.given) + len(self.use.questions) + len(self.use.trims) + sum(map(len, self.names.values()))
        )

    # ---- statements --------------------------------------------------------------------------------------------------------------------

    def statements(self, body: Iterable[nodes.Node]) -> None:
        for node in body:
            self.statement(node)

    def statement(self, node: nodes.Node) -> None:
        match node:
            case nodes.Output():
                for part in node.nodes:
                    self.want(part, "none", "content", "mixed")
            case nodes.If():
                self.condition(node)
            case nodes.For():
                self.loop(node)
            case nodes.Assign():
                self.assign(node.target, self.kind(node.node))
            case nodes.AssignBlock() if node.filter is None:
                self.statements(node.body)
                self.assign(node.target, "mixed")
            case nodes.Macro():
                self.macros[node.name] = node
                for default in node.defaults:
                    self.want(default, "none")
                for argument in node.args:
                    self.assign(argument, "none")
                self.statements(node.body)
            case nodes.CallBlock() if isinstance(node.call, nodes.Call) and isinstance(node.call.node, nodes.ExtensionAttribute):
                self.statements(node.body)
            case nodes.ExprStmt():
                self.want(node.node, "none")
            case nodes.Break() | nodes.Continue():
                pass
            case _:
                raise LooksInsideError

    def condition(self, node: nodes.If) -> None:
        """Only the branches that a content can lead to about which every question is answered with no."""
        for branch in (node, *node.elif_):
            self.truth(branch.test)
            answer = self.answer(branch.test)
            if answer is not False:
                self.statements(branch.body)
            if answer is True:
                return
        self.statements(node.else_)

    def loop(self, node: nodes.For) -> None:
        kind = self.kind(node.iter)
        if kind in ("content", "mixed"):
            raise LooksInsideError
        if isinstance(node.target, nodes.Name) and node.target.name not in self.given:
            self.looped.add(node.target.name)
            self.names.setdefault(node.target.name, set()).add(kind)
        else:
            self.assign(node.target, kind)
        if node.test is not None:
            self.truth(node.test)
        self.statements(node.body)
        self.statements(node.else_)

    def assign(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Tuple):
            if kind != "none":
                raise LooksInsideError
            for item in target.items:
                self.assign(item, kind)
        elif isinstance(target, nodes.Name):
            self.names.setdefault(target.name, set()).add(kind)
            self.given.add(target.name)
            self.looped.discard(target.name)
        elif isinstance(target, nodes.NSRef):
            self.names.setdefault(f"{target.name}.{target.attr}", set()).add(kind)
        else:
            raise LooksInsideError

    # ---- conditions --------------------------------------------------------------------------------------------------------------------

    def truth(self, node: nodes.Node) -> None:
        """An expression of which only the truth is used."""
        if isinstance(node, nodes.Not):
            self.truth(node.node)
        elif isinstance(node, nodes.And | nodes.Or):
            self.truth(node.left)
            self.truth(node.right)
        else:
            kind = self.kind(node)
            if kind == "mixed":
                raise LooksInsideError
            if kind == "content":
                self.use.questions.add(("empty", ""))

    def answer(self, node: nodes.Node) -> bool | None:
        """What a condition comes to where all questions are answered with no; None where that depends on other things too."""
        match node:
            case nodes.Not():
                inner = self.answer(node.node)
                return None if inner is None else not inner
            case nodes.And() | nodes.Or():
                ends = isinstance(node, nodes.Or)
                sides = self.answer(node.left), self.answer(node.right)
                return ends if ends in sides else (None if None in sides else not ends)
            case nodes.Test() if node.name in _TYPE_TESTS and self.is_content(node.node):
                return _TYPE_TESTS[node.name]
            case nodes.Compare() | nodes.Call():
                question = self.question(node)
                if question is None or not (self.is_content(question[1]) or self.is_name_of_content(question[1])):
                    return None
                return isinstance(node, nodes.Compare) and node.ops[0].op in ("notin", "ne")
        return True if self.is_content(node) else None

    def is_content(self, node: nodes.Node) -> bool:
        """Whether an expression is the content of a message that there surely is: of the one of a loop, or the first."""
        if not isinstance(node, nodes.Getattr | nodes.Getitem) or self.kind(node) != "content":
            return False
        base = node.node
        if isinstance(base, nodes.Name):
            return base.name in self.looped and self.names[base.name] == {"message"}
        if not (isinstance(base, nodes.Getitem) and isinstance(base.arg, nodes.Const) and base.arg.value == 0):
            return False
        return isinstance(base.node, nodes.Name) and base.node.name == "messages" and "messages" not in self.given

    def is_name_of_content(self, node: nodes.Node) -> bool:
        """Whether an expression is a name that was given contents and nothing else, or nothing yet."""
        return isinstance(node, nodes.Name) and self.names.get(node.name) == {"content"}

    def question(self, node: nodes.Node) -> tuple[Question, nodes.Expr] | None:
        """The question that an expression asks, and of what."""
        if isinstance(node, nodes.Compare) and len(node.ops) == 1:
            op, other = node.ops[0].op, node.ops[0].expr
            left, right = _text(node.expr), _text(other)
            if op in ("in", "notin") and left is not None:
                return ("in", left), other
            if op in ("eq", "ne") and (left is None) != (right is None):
                return ("eq", left or right or ""), node.expr if left is None else other
        if not isinstance(node, nodes.Call) or not isinstance(node.node, nodes.Getattr) or node.kwargs or node.dyn_args or node.dyn_kwargs:
            return None
        text = _text(node.args[0]) if len(node.args) == 1 else None
        what = node.node.attr
        return None if text is None or what not in ("startswith", "endswith") else ((what, text), node.node.node)

    # ---- expressions -------------------------------------------------------------------------------------------------------------------

    def want(self, node: nodes.Node, *kinds: Kind) -> None:
        if self.kind(node) not in kinds:
            raise LooksInsideError

    def kind(self, node: nodes.Node) -> Kind:
        match node:
            case nodes.Name():
                return self.join(self.names.get(node.name, ()))
            case nodes.Getattr() | nodes.Getitem():
                return self.part(node)
            case nodes.Compare() | nodes.Call() if (asked := self.question(node)) is not None and self.kind(asked[1]) == "content":
                self.use.questions.add(asked[0])
                return "none"
            case nodes.Call():
                return self.call(node)
            case nodes.Filter():
                return self.filtered(node)
            case nodes.Test() if node.name in _TYPE_TESTS:
                self.kind(node.node)
                return "none"
            case nodes.Not():
                self.truth(node)
                return "none"
            case nodes.And() | nodes.Or():
                self.truth(node)
                return "none" if {self.kind(node.left), self.kind(node.right)} == {"none"} else self.either(node.left, node.right)
            case nodes.CondExpr():
                self.truth(node.test)
                return self.either(node.expr1, *([] if node.expr2 is None else [node.expr2]))
            case nodes.Add() | nodes.Concat():
                parts = [self.kind(part) for part in node.iter_child_nodes()]
                if "message" in parts:
                    raise LooksInsideError
                return "mixed" if {"content", "mixed"} & set(parts) else "none"
        for child in node.iter_child_nodes():
            self.want(child, "none")
        return "none"

    def either(self, *options: nodes.Node) -> Kind:
        kinds = {self.kind(option) for option in options}
        if "message" in kinds and len(kinds) > 1:
            raise LooksInsideError
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def join(self, kinds: Iterable[Kind]) -> Kind:
        found = set(kinds) - {"none"}
        if "message" in found and len(found) > 1:
            raise LooksInsideError
        return "mixed" if len(found) > 1 else next(iter(found), "none")

    def part(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        """A part of a message, of the list of them, or of something else."""
        key = node.attr if isinstance(node, nodes.Getattr) else node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(node.node, nodes.Name) and isinstance(key, str):
            if node.node.name == "loop":
                return "message" if key in ("previtem", "nextitem") else "none"
            if f"{node.node.name}.{key}" in self.names:
                return self.join(self.names[f"{node.node.name}.{key}"])
        if isinstance(node, nodes.Getitem):
            self.want(node.arg, "none")
        base = self.kind(node.node)
        if base in ("content", "mixed"):
            raise LooksInsideError
        if base == "none":
            return "none"
        if key == "content":
            return "content"
        if isinstance(key, str):
            if isinstance(node, nodes.Getattr) and key in _OF_COLLECTIONS:
                raise LooksInsideError
            return "none"
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Name | nodes.Call | nodes.Filter | nodes.CondExpr):
            return "message"  # a number, a slice, or a place that is computed
        raise LooksInsideError

    def call(self, node: nodes.Call) -> Kind:
        if node.dyn_args or node.dyn_kwargs:
            raise LooksInsideError
        given = [*node.args, *(pair.value for pair in node.kwargs)]
        if isinstance(node.node, nodes.Getattr):
            base, name = self.kind(node.node.node), node.node.attr
            texts = [_text(one) for one in given]
            if base == "message" and name == "get" and len(given) in (1, 2) and texts[0] is not None and node.args:
                self.want(given[-1], "none")
                return "content" if texts[0] == "content" else "none"
            if base == "content" and name in _TRIMS and not node.kwargs and (not given or (len(given) == 1 and texts[0] is not None)):
                self.use.trims.add((name, texts[0] if texts else None))
                return "mixed"
            if base != "none":
                raise LooksInsideError
        elif isinstance(node.node, nodes.Name) and node.node.name in self.macros:
            return self.macro(self.macros[node.node.name], node)
        elif not (isinstance(node.node, nodes.Name) and node.node.name in _HARMLESS_CALLS):
            raise LooksInsideError
        for one in given:
            self.want(one, "none")
        return "none"

    def macro(self, macro: nodes.Macro, node: nodes.Call) -> Kind:
        by_name = {argument.name: argument for argument in macro.args}
        pairs = [*zip(macro.args, node.args, strict=False), *((by_name[pair.key], pair.value) for pair in node.kwargs if pair.key in by_name)]
        if len(pairs) != len(node.args) + len(node.kwargs):
            raise LooksInsideError
        for argument, value in pairs:
            self.assign(argument, self.kind(value))
        return "mixed"

    def filtered(self, node: nodes.Filter) -> Kind:
        plain = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        base = "none" if node.node is None else self.kind(node.node)
        if base == "message" and plain and node.name in ("length", "count"):
            return "none"
        if base == "message" and plain and node.name in ("first", "last", "list"):
            return "message"
        if base == "content" and plain and node.name == "trim":
            self.use.trims.add(("strip", None))
            return "mixed"
        if base != "none":
            raise LooksInsideError
        for child in node.iter_child_nodes():
            self.want(child, "none")
        return "none"


def _text(node: nodes.Node) -> str | None:
    """A text that is written in the template."""
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None
