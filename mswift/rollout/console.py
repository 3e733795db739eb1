"""The user's side of a conversation: lines in, text out, Ctrl-C; on a terminal or through a pipe, for one process or several."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Console:
    """Reads on the main process only; every process gets the same lines, and the main one writes.

    On a terminal a line has a prompt before it, can be edited, and earlier ones come back; through a pipe there is no prompt and the
    output is nothing but the answers. Notes go to stderr.

    Args:
        is_main: this process talks to the user. share: gives what the main process passes to every process.
    """

    def __init__(self, *, is_main: bool = True, share: Callable[[str | None], str | None] | None = None) -> None:
        self.is_main, self._share = is_main, share
        self.interrupted = False  # Ctrl-C ended the last `until_interrupt`
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        for stream in (sys.stdin, sys.stdout):  # a byte that is no text must not end the conversation
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines)

    @property
    def can_interrupt(self) -> bool:
        """Whether Ctrl-C stops an answer: it reaches several processes at different points, and ends them."""
        return self._share is None

    def read(self, prompt: str) -> str | None:
        """The next line without its end; None at the end of the input, or after Ctrl-C twice."""
        line = self._read(prompt) if self.is_main else None
        return line if self._share is None else self._share(line)

    def _read(self, prompt: str) -> str | None:
        with contextlib.suppress(KeyboardInterrupt):
            return self._read_once(prompt)
        self.note("\n(Ctrl-C again leaves; so does quit)")
        with contextlib.suppress(KeyboardInterrupt):
            return self._read_once(prompt)
        return None

    def _read_once(self, prompt: str) -> str | None:
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            self.write("\n")
            return None

    def write(self, text: str) -> None:
        """Show a piece of an answer at once."""
        if self.is_main:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Tell the user something that is not part of the conversation."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def until_interrupt(self, pieces: Iterator[T]) -> Iterator[T]:
        """`pieces` until Ctrl-C; a second Ctrl-C before the first is heeded raises KeyboardInterrupt."""
        self.interrupted = False
        if not self.can_interrupt:
            yield from pieces
            return
        pressed: list[int] = []

        def press(number: int, _frame: object) -> None:
            if pressed:
                raise KeyboardInterrupt
            pressed.append(number)

        before = signal.signal(signal.SIGINT, press)
        try:
            for piece in pieces:
                yield piece
                if pressed:
                    self.interrupted = True
                    break
        finally:
            signal.signal(signal.SIGINT, before)
