"""Names of models: a path never reaches a hub, an id reaches the right client with the right patterns, failures are one line."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import modelscope
import pytest

from mswift.conversion.hub import resolve_model
from mswift.errors import MissingExtraError, ModelError


def refuse(*args: Any, **kwargs: Any) -> str:
    raise AssertionError("a hub was contacted")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(modelscope, "snapshot_download", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("use_hf", [True, False])
def test_a_path_never_contacts_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_hf: bool) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model", use_hf=use_hf) == Path("org/model")
    assert resolve_model("org/model/", use_hf=use_hf) == Path("org/model")
    assert resolve_model("org", use_hf=use_hf) == Path("org")
    assert resolve_model(tmp_path / "org", use_hf=use_hf) == tmp_path / "org"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org", use_hf=use_hf) == tmp_path / "org"
    for name in ("./org/other", "../x", "/no/where", "~/nothing", "a/b/c", "a b", Path("org/other")):
        with pytest.raises(ModelError, match="does not exist; give an existing directory or a hub id") as caught:
            resolve_model(name, use_hf=use_hf)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="is empty"):
        resolve_model(" ", use_hf=use_hf)


@pytest.mark.parametrize("use_hf", [True, False])
def test_an_id_is_downloaded_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_hf: bool) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def download(name: str, **kwargs: Any) -> str:
        calls.append((name, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub if use_hf else modelscope, "snapshot_download", download)
    assert resolve_model("Org/Model-1.5", use_hf=use_hf, revision="v2", token="secret") == tmp_path
    assert resolve_model("gpt2", use_hf=use_hf, trust_remote_code=True) == tmp_path
    (name, first), (_, second) = calls
    assert (name, first["revision"], first["token"]) == ("Org/Model-1.5", "v2", "secret")
    assert "*.safetensors" in first["allow_patterns"]
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in first["allow_patterns"])
    assert "*.py" in second["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in second["allow_patterns"])


def test_failures_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(modelscope, "snapshot_download", unreachable)
    for use_hf, hub in ((True, "Hugging Face"), (False, "ModelScope")):
        with pytest.raises(ModelError, match=rf"org/model is not a local directory and could not be had from {hub} \(no connection\)") as caught:
            resolve_model("org/model", use_hf=use_hf)
        assert "\n" not in str(caught.value)


def test_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="could not be had from Hugging Face") as caught:
        resolve_model("mswift-nobody/never-there")
    assert "\n" not in str(caught.value)
    assert list(os.scandir(tmp_path)) == []


def test_modelscope_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "modelscope":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'mswift\[modelscope\]'"):
        resolve_model("org/model", use_hf=False)
