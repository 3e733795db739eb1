"""Checks that every command makes before it starts anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mswift.commands.session import check_writable
from mswift.errors import ConfigError


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "--output_dir")
    check_writable(tmp_path, "--output_dir")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("gone").symlink_to("nowhere")
    for name in ("file", "gone"):
        with pytest.raises(ConfigError, match=rf"^--output_dir {name}/a/b: .*/{name} is not a folder; give another place$"):
            check_writable(Path(name, "a", "b"), "--output_dir")
    assert Path("file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot be written to \(Permission denied\); give another folder"):
        check_writable(tmp_path / "out", "--output_dir")
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []
