"""From what a user calls a model to a local directory. A path never leads to the network; a hub is asked only for an id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mswift.errors import MissingExtraError, ModelError

PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
DUPLICATES = ["original/*", "onnx/*", "consolidated*.safetensors"]  # the same weights in a layout that is not read here
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(
    name_or_path: str | Path,
    *,
    use_hf: bool = True,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Path:
    """The local directory of a model; downloaded first where the name is that of a hub.

    Args:
        name_or_path: a directory, or an id such as ``Qwen/Qwen3-0.6B``. use_hf: Hugging Face; False: ModelScope.
        revision, token: for the hub. trust_remote_code: fetch the repository's Python files as well; no pickle in any case.
        weights: fetch the weights too, and not only config and tokenizer.

    Raises:
        ModelError: a path that does not exist, an id that the hub does not have, or no connection.
        MissingExtraError: ModelScope's client is not installed.
    """
    local = local_model(name_or_path)
    if local is not None:
        return local
    name = str(name_or_path).strip()
    patterns = [*(pattern for pattern in PATTERNS if weights or "safetensors" not in pattern), *(["*.py"] if trust_remote_code else [])]
    return _from_hugging_face(name, revision, token, patterns) if use_hf else _from_modelscope(name, revision, token, patterns)


def local_model(name_or_path: str | Path) -> Path | None:
    """The directory of a model that is on this machine; None for the id of one on a hub, which is not asked.

    Raises:
        ModelError: no name, or a path that does not exist.
    """
    name = str(name_or_path).strip()
    if not name:
        raise ModelError("the name of the model is empty; give an existing directory or a hub id such as Qwen/Qwen3-0.6B")
    path = Path(name).expanduser()
    if os.path.exists(path):
        return path
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not _HUB_ID.fullmatch(name):
        raise ModelError(f"model directory {name} does not exist; give an existing directory or a hub id such as Qwen/Qwen3-0.6B")
    return None


def _from_hugging_face(name: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=DUPLICATES))
    except errors.GatedRepoError:
        raise ModelError(f"{name} is gated on Hugging Face; accept its terms there and give a token (HF_TOKEN)") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{name} is neither a local directory nor a model on Hugging Face; check the name, or give a token if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision} on Hugging Face; check its branches and tags") from None
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise _unreachable(name, "Hugging Face", error) from error


def _from_modelscope(name: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise MissingExtraError("modelscope", "modelscope") from None
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=DUPLICATES))
    except Exception as error:  # the types that its client raises differ from version to version
        raise _unreachable(name, "ModelScope", error) from error


def _unreachable(name: str, hub: str, error: Exception) -> ModelError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].split(". ")[0]
    return ModelError(f"{name} is not a local directory and could not be had from {hub} ({reason}); check the name and the connection")
