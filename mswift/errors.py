"""The one error tree: every error that a user can cause, each also the standard-library error that it replaces.

A message says what was got, what was wanted and what to change, on one line. `mswift.cli` prints it without a traceback and exits with
`exit_code`; anything that is not an `MswiftError` is a fault of ours and keeps its traceback.
"""

from __future__ import annotations


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library says in however many lines, as one of at most `limit` characters; the name of the error where it says nothing."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class MswiftError(Exception):
    """Base of all errors that carry a message for the user."""

    exit_code = 2


class ConfigError(MswiftError, ValueError):
    """A flag, a YAML file, or a combination of settings is wrong."""


class LayoutError(MswiftError, ValueError):
    """The parallel layout does not fit the world size or the model."""


class ModelError(MswiftError, ValueError):
    """A model directory is missing, incomplete, corrupt, or of an architecture that no family covers."""


class ConversionError(MswiftError, ValueError):
    """A checkpoint and a model do not match tensor for tensor."""


class DifferenceError(MswiftError, ValueError):
    """Two models that were to be equal are not."""

    exit_code = 1


class DataError(MswiftError, ValueError):
    """A data source, a row or a template is wrong."""


class CheckpointError(MswiftError, RuntimeError):
    """A training checkpoint cannot be written, or cannot be resumed from."""


class LaunchError(MswiftError, RuntimeError):
    """Processes cannot be started or cannot find each other."""


class MissingExtraError(MswiftError, ImportError):
    """An optional library is not installed.

    Args:
        library: the import name that failed, such as ``"vllm"``.
        extra: the extra of this distribution that brings it, such as ``"vllm"``.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed: it is needed here; install it with pip install 'mswift[{extra}]'")
        self.library, self.extra = library, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.library, self.extra)
