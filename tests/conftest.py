"""What all tests start from."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Ctrl-C reaches the programs that tests start: a shell makes its background jobs ignore it, and they would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
