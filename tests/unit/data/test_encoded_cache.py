"""Cached data sets: the same rows as in memory, mapped; anything that does not fit them is one line; memory stays flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mswift.data import Row, encode_dataset
from mswift.data.batches import Batches
from mswift.data.cache import CacheSink, check_cached, find_cached, load_cached, open_cached
from mswift.data.encoded import TokenRows, join
from mswift.errors import DataError
from mswift.templates import ChatTemplate

ROOT = Path(__file__).parents[3]


def rows_of(*answers: str, source: str = "a.jsonl") -> list[Row]:
    pairs = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in answers]
    return [Row(messages, {}, source, line) for line, messages in enumerate(pairs, start=1)]


def write(folder: Path, rows: list[Row], template: ChatTemplate, files: tuple[str, ...] = (), **options: object) -> TokenRows:
    return encode_dataset(rows, template, sink=CacheSink(folder, template.identity(), files), **options)  # type: ignore[arg-type]


def test_the_rows_are_those_in_memory(chatml: ChatTemplate, tmp_path: Path) -> None:
    rows = rows_of(*(f"answer {i} " * (i % 7) for i in range(600))) + rows_of("x", source="b.jsonl")
    memory = encode_dataset(rows, chatml, max_length=60)
    made = write(tmp_path / "cached", rows, chatml, max_length=60, num_proc=2)
    mapped = load_cached([str(tmp_path / "cached")])
    for cached in (made, mapped):
        assert list(cached) == list(memory)
        assert cached.fingerprint() == memory.fingerprint()
        assert cached.num_tokens == memory.num_tokens
        assert [cached.where(i) for i in range(len(cached))] == [memory.where(i) for i in range(len(memory))]
        assert isinstance(cached.arrays(3)[0], np.memmap)
        assert [batch.input_ids.tolist() for batch in Batches(cached, micro_batch_size=2, global_batch_size=8).step(1)] == [
            batch.input_ids.tolist() for batch in Batches(memory, micro_batch_size=2, global_batch_size=8).step(1)
        ]
    assert memory.report.num_dropped > 0
    assert (tmp_path / "cached" / "dropped_rows.txt").read_text().count("\n") == memory.report.num_dropped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached"]
    manifest = json.loads((tmp_path / "cached" / "manifest.json").read_text())
    assert manifest["report"] == memory.report.lines()
    assert (manifest["rows"], manifest["longest"]) == (len(memory), int(memory.lengths.max()))


def test_rows_can_be_chosen_and_joined(chatml: ChatTemplate, tmp_path: Path) -> None:
    first = write(tmp_path / "one", rows_of("a", "b", "c"), chatml)
    second = write(tmp_path / "two" / "train", rows_of("d", "e", source="b.jsonl"), chatml)
    both = load_cached([str(tmp_path / "one"), str(tmp_path / "two")])
    assert list(both) == [*first, *second]
    assert [both.where(i) for i in (2, 3, 4)] == ["a.jsonl:3", "b.jsonl:1", "b.jsonl:2"]
    some = both.choose([4, 0, 4])
    assert list(some) == [second[1], first[0], second[1]]
    assert [some.where(i) for i in range(3)] == ["b.jsonl:2", "a.jsonl:1", "b.jsonl:2"]
    assert len({both.fingerprint(), some.fingerprint(), first.fingerprint(), both.choose([4, 0, 3]).fingerprint()}) == 4
    sampled = load_cached([f"{tmp_path / 'one'}#5"], seed=3)
    assert sorted(sampled.where(i) for i in range(5))[0] == "a.jsonl:1"
    assert len(sampled) == 5
    assert len({sampled.where(i) for i in range(3)}) == 3
    plain = load_cached([f"{tmp_path / 'one'}#2"], shuffle=False)
    assert [plain.where(i) for i in range(2)] == ["a.jsonl:1", "a.jsonl:2"]
    in_memory = encode_dataset(rows_of("z"), chatml)
    assert list(join([in_memory, second], in_memory.report)) == [in_memory[0], *second]


def test_what_does_not_fit_is_one_line(chatml: ChatTemplate, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("first")
    folder = tmp_path / "cached"
    data = write(folder, rows_of("a", "b" * 30), chatml, (str(source),))
    check_cached(folder, chatml.identity(), int(data.lengths.max()))
    other = ChatTemplate(chatml.tokenizer, system="Be kind.")
    setting = "setting of the template (system, loss_scale, enable_thinking)"
    again = "make it again with mswift export --to_cached_dataset true"
    faults = {
        f"{folder} was made with another {setting} than this run has; {again} and the same flags": (other.identity(), None),
        f"{folder} was made with another tokenizer than this run has; {again} and the same flags": ({**chatml.identity(), "tokenizer": "0"}, None),
        f"{folder} has rows of {data.lengths.max()} tokens, more than --max_length 20; raise it, or {again}": (chatml.identity(), 20),
    }
    for message, (identity, limit) in faults.items():
        with pytest.raises(DataError) as wrong:
            check_cached(folder, identity, limit)
        assert str(wrong.value) == message
    source.write_text("other")
    with pytest.raises(DataError, match=r"was made from .*a\.jsonl, which has changed since; "):
        check_cached(folder, chatml.identity(), None)
    source.unlink()
    check_cached(folder, chatml.identity(), None)
    with pytest.raises(DataError, match=r"is no cached data set \(there is no manifest\.json in it or in its folder val\)"):
        find_cached(str(tmp_path), "val")
    with pytest.raises(DataError, match=r"wanted a whole number of rows after #, got 'x'$"):
        find_cached(f"{folder}#x")


def test_damage_is_noticed(chatml: ChatTemplate, tmp_path: Path) -> None:
    folder = tmp_path / "cached"
    write(folder, rows_of("a", "b", "c"), chatml)
    ids = np.load(folder / "ids.npy")
    np.save(folder / "ids.npy", ids[:-1])
    with pytest.raises(DataError, match=r"is damaged: its files have \(3, 3, \d+, \d+\) rows, rows, tokens and weights, its manifest"):
        open_cached(folder)
    (folder / "ids.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="is damaged: "):
        open_cached(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is of another version, wanted 1; "):
        open_cached(folder)


def test_a_data_set_appears_whole_or_not_at_all(chatml: ChatTemplate, tmp_path: Path) -> None:
    rows = rows_of("a", "b")
    sink = CacheSink(tmp_path / "cached", chatml.identity(), ())
    chunk = encode_dataset(rows, chatml)
    sink.add(*chunk.arrays(0), chunk.lengths[:1], rows[:1])
    assert not (tmp_path / "cached").exists()
    sink.remove()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".cached.incomplete").mkdir()
    (tmp_path / ".cached.incomplete" / "left.npy").write_bytes(b"x")
    assert len(write(tmp_path / "cached", rows, chatml)) == 2
    assert not (tmp_path / "cached" / "left.npy").exists()


PASS = """
import re, sys
import numpy as np
from mswift.data.encoded import TokenArrays, rows_of_arrays
from mswift.data.report import LengthReport
import mswift.data.encoded as encoded
folder, order, limit = sys.argv[1:]
if int(limit):
    encoded._FORGET_BYTES, encoded._LOOK_EVERY = int(limit), 4
ids, weights = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("ids", "weights"))
lengths = np.full(len(ids) // 1000, 1000)
data = rows_of_arrays(TokenArrays(ids, weights, ["a"], np.zeros((len(lengths), 2), np.int64)), lengths, LengthReport(None, "delete"))
rows = np.random.default_rng(0).permutation(len(data)) if order == "shuffled" else np.arange(len(data))
mapped = lambda: int(re.search(r"RssFile:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, most, total = mapped(), 0, 0.0
for n, i in enumerate(rows.tolist()):
    total += int(data.arrays(i)[0][::100].sum()) + float(data.arrays(i)[1][::100].sum())
    most = max(most, mapped() - before) if n % 8 == 0 else most
print(total, most, mapped() - before)
"""


def read_mapped(folder: Path, tokens: int, order: str, limit: int) -> tuple[int, int]:
    """KiB of mapped files in the memory of a process: at most during a pass, and at its end."""
    np.save(folder / "ids.npy", np.ones(tokens, np.int32))
    np.save(folder / "weights.npy", np.ones(tokens, np.float32))
    done = subprocess.run([sys.executable, "-c", PASS, str(folder), order, str(limit)], cwd=ROOT, capture_output=True, text=True, check=True)
    total, most, mapped = done.stdout.split()
    assert float(total) == tokens // 50
    return int(most), int(mapped)


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_a_pass_over_mapped_rows_does_not_fill_the_memory(tmp_path: Path, order: str) -> None:
    """240 MB of tokens and weights, of which 16 MB may stay; Linux may map 2 MiB around each row that is read."""
    most, _ = read_mapped(tmp_path, 30_000_000, order, 2**24)
    assert most < 60_000, "KiB"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "weights.npy"]


def test_what_fits_stays(tmp_path: Path) -> None:
    """48 MB are never given back, and so never fetched twice."""
    _, mapped = read_mapped(tmp_path, 6_000_000, "in order", 0)
    assert mapped > 46_000, "KiB"
    assert len(list(tmp_path.iterdir())) == 2


GROW = """
import re, sys
import numpy as np
from mswift.data.encoded import MemorySink
from mswift.data.report import LengthReport
from mswift.data.rows import Row
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
sink, row, chunks, before = MemorySink(), Row([], {}, "a.jsonl", 1), 60, own()
for number in range(chunks):
    lengths = np.asarray([400_000 + number, 3])
    tokens = int(lengths.sum())
    sink.add(np.arange(number, number + tokens, dtype=np.int32), np.full(tokens, number, np.float32), lengths, [row, row])
data = sink.finish(LengthReport(None, "delete"))
grown = own() - before
for number in range(chunks):
    ids, weights = data.arrays(2 * number)
    assert ids[0] == number and ids[-1] == 400_000 + 2 * number - 1 and len(ids) == 400_000 + number
    assert (weights == number).all()
    assert data.arrays(2 * number + 1)[0].tolist() == [400_000 + 2 * number + i for i in range(3)]
print(data.num_tokens, grown)
"""


def test_rows_in_memory_are_there_once(tmp_path: Path) -> None:
    """192 MB of tokens and weights, made chunk by chunk: nothing is copied at the end."""
    done = subprocess.run([sys.executable, "-c", GROW], cwd=ROOT, capture_output=True, text=True, check=True)
    tokens, grown = map(int, done.stdout.split())
    assert tokens == 60 * 400_003 + 59 * 30
    assert grown < 1.15 * 8 * tokens / 1024, "KiB"
    assert list(tmp_path.iterdir()) == []
