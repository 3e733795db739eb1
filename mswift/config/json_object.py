"""Small JSON files of checkpoints and runs, which users edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mswift.errors import MswiftError


def read_json_object(path: Path, error: type[MswiftError], advice: str) -> dict[str, Any]:
    """What a file says.

    Args:
        error: what is raised where it cannot be read or holds no object. advice: the end of its line, what to do then.
    """
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {str(cause).splitlines()[0]}; {advice}") from cause
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object; {advice}")
    return content
