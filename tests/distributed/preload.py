"""What every rank of a test world imports: done once in the fork server, so that a world starts in a second instead of ten."""

from __future__ import annotations

from mswift.runtime import cpu

cpu.install(force=True)

import transformers  # noqa: E402, F401
