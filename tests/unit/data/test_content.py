"""Blocks of text and media, and media columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mswift.data.content import read_content, read_media
from mswift.data.sources import RawRow
from mswift.errors import DataError

RAW = RawRow({}, "a.jsonl", 3)
URI = "data:image/png;base64,aGVsbG8="


def test_text_blocks_become_text() -> None:
    assert read_content(RAW, "c", "user", [{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": "c"}]).content == "abc"
    assert read_content(RAW, "c", "user", "a").content == "a"
    assert read_content(RAW, "c", "tool", [1, 2]).content == "[1, 2]"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": "https://x/y.png"}}, {"type": "image", "image": "https://x/y.png"}),
        ({"type": "image_url", "image_url": URI}, {"type": "image", "image": URI}),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}, {"type": "image", "image": URI}),
        ({"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}, {"type": "image", "image": "https://x/y.png"}),
        ({"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}}, {"type": "audio", "audio": "data:audio/wav;base64,aGVsbG8="}),
        ({"type": "video", "video": "s3://b/v.mp4"}, {"type": "video", "video": "s3://b/v.mp4"}),
        ({"type": "image"}, {"type": "image"}),
    ],
)
def test_media_blocks(block: dict[str, Any], expected: dict[str, Any]) -> None:
    found = read_content(RAW, "c", "user", [{"type": "text", "text": "look"}, block])
    assert found.content == [{"type": "text", "text": "look"}, expected]
    assert not found.calls


def test_media_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(b"x")
    beside = RawRow({}, str(tmp_path / "sub" / "rows.jsonl"), 1)
    assert read_media(RAW, "images", "sub/x.png") == ["sub/x.png"]
    assert read_media(beside, "images", ["x.png", URI]) == [str(tmp_path / "sub" / "x.png"), URI]
    assert read_media(RAW, "images", '["https://x/a.png"]') == ["https://x/a.png"]
    assert read_media(RAW, "images", [{"bytes": b"x", "path": None}, b"y"]) == [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}]
    assert read_media(beside, "images", {"path": "x.png"}) == [{"path": str(tmp_path / "sub" / "x.png")}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.png", "images[0] is 'no.png': there is no such file in "),
        (["https://x/a b.png"], "images[0] is 'https://x/a b.png', wanted a whole URL without spaces"),
        ("data:image/png,xx", "images[0] is a data URI that cannot be read (it has no ;base64,), wanted data:image/png;base64,..."),
        ("data:image/png;base64,a*", "images[0] is a data URI that cannot be read (Only base64 data is allowed), wanted data:image/png"),
        ([{}], "images[0] is an object with the keys (none), wanted one with bytes, path or url"),
        ([5], "images[0] is 5, wanted a path, a URL, a data URI or an object with bytes or path"),
    ],
)
def test_faults_of_media(value: Any, message: str) -> None:
    with pytest.raises(DataError) as wrong:
        read_media(RAW, "images", value)
    assert str(wrong.value).startswith(f"a.jsonl:3: {message}")


@pytest.mark.parametrize(
    ("role", "blocks", "message"),
    [
        ("user", [5], "c[0] is 5, wanted a block such as"),
        ("user", [{"type": "text", "text": 5}], "c[0].text is 5, wanted a string"),
        ("user", [{"type": "smell"}], "c[0].type is 'smell' in a turn of role user, wanted one of text, image, audio, video, "),
        ("user", [{"type": "tool_use", "name": "f"}], "c[0].type is 'tool_use' in a turn of role user, wanted one of "),
        ("user", [{"type": "image_url", "image_url": {"url": "https://x/ y"}}], "c[0].image_url is 'https://x/ y', wanted a whole URL"),
    ],
)
def test_faults_of_blocks(role: str, blocks: list[Any], message: str) -> None:
    with pytest.raises(DataError) as wrong:
        read_content(RAW, "c", role, blocks)
    assert str(wrong.value).startswith(f"a.jsonl:3: {message}")
