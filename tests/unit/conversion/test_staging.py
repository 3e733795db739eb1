"""Staging: a directory is seen whole or not at all, and what was there survives a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from mswift.conversion.staging import check_space, make_temporary, publish, staged
from mswift.errors import ConversionError


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError("bad"), KeyboardInterrupt()])
def test_an_error_inside_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write_and_fail() -> None:
        with staged(tmp_path / "out") as temporary:
            (temporary / "a").write_text("1")
            raise error

    with pytest.raises(type(error)):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_comes_back_if_the_rename_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    gone = make_temporary(tmp_path / "out")
    gone.rmdir()
    with pytest.raises(ConversionError, match=r"cannot make .* visible"):
        publish(gone, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_cannot_be_finished_is_not_begun(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(ConversionError, match=r"1000000000.00 GB are to be written"):
        check_space(tmp_path, 10**18)
    with pytest.raises(ConversionError, match="are to be written"), staged(tmp_path / "out", nbytes=10**18):
        raise AssertionError("it was begun")
    assert list(tmp_path.iterdir()) == []
