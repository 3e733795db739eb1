"""Preference rows through the data path: both answers of a pair in one micro batch, or neither in any."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mswift.data.batches import Batches
from mswift.data.cache import CacheSink, open_cached
from mswift.data.encoding import encode_dataset
from mswift.data.packing import PackIndex
from mswift.data.pairs import EncodedPairs, encode_pairs, load_pairs
from mswift.data.rows import Row
from mswift.errors import DataError
from mswift.templates import ChatTemplate

answers = st.tuples(st.integers(0, 12), st.integers(0, 12))


def make_row(line: int, chosen: int, rejected: int) -> Row:
    asked = [{"role": "user", "content": f"question {line}"}]
    good, bad = (
        [*asked, {"role": "assistant", "content": f"{kind} {line} " + "word " * count}] for kind, count in (("yes", chosen), ("no", rejected))
    )
    return Row(good, {}, "rows.jsonl", line, rejected=bad)


def micro_batches(pairs: EncodedPairs, packed: bool, dp: int, epoch: int = 0) -> list[list[int]]:
    """The rows of every micro batch of an epoch, over all ranks."""
    packs = PackIndex(pairs.data.lengths, 256, groups=pairs.groups) if packed else None
    ranks = [
        Batches(pairs.data, micro_batch_size=1 if packed else 2, global_batch_size=3, dp_rank=rank, dp_size=dp, packs=packs, groups=pairs.groups)
        for rank in range(dp)
    ]
    steps = ranks[0].steps_per_epoch
    return [batch.rows for k in range(epoch * steps, (epoch + 1) * steps) for rank in ranks for batch in rank.step(k) if batch.rows]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=st.lists(answers, min_size=1, max_size=14), packed=st.booleans(), dp=st.integers(1, 3), epoch=st.integers(0, 1))
def test_pairs_stay_together_and_come_once(chatml: ChatTemplate, made: list[tuple[int, int]], packed: bool, dp: int, epoch: int) -> None:
    rows = [make_row(i + 1, *lengths) for i, lengths in enumerate(made)]
    pairs = encode_pairs(rows, chatml)
    assert len(pairs) == len(rows)
    for number, row in enumerate(rows):
        assert row.rejected is not None
        assert pairs.data[2 * number] == chatml.encode(row.messages)
        assert pairs.data[2 * number + 1] == chatml.encode(row.rejected)
        assert pairs.data.where(2 * number) == pairs.data.where(2 * number + 1) == row.where
    batches = micro_batches(pairs, packed, dp, epoch)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(2 * len(rows)))
    for members in batches:
        assert [row // 2 for row in members[::2]] == [row // 2 for row in members[1::2]]
        assert all(row % 2 == place % 2 for place, row in enumerate(members)), "the chosen one comes first"
        assert not packed or pairs.data.lengths[members].sum() <= 256
    assert sorted(map(sorted, batches)) == sorted(map(sorted, micro_batches(pairs, packed, 1, epoch))), "whatever the number of ranks"


def test_what_one_answer_lacks_takes_both_away(chatml: ChatTemplate) -> None:
    rows = [make_row(1, 1, 1), make_row(2, 60, 1), make_row(3, 1, 60), make_row(4, 2, 2)]
    rows.append(Row(rows[0].messages, {}, "rows.jsonl", 5, rejected=[{"role": "user", "content": "no answer"}]))
    pairs = encode_pairs(rows, chatml, max_length=120, max_bad_share=0.5)
    assert [pairs.data.where(i) for i in range(len(pairs.data))] == [f"rows.jsonl:{line}" for line in (1, 1, 4, 4)]
    assert [line for _, line, _ in pairs.data.report.dropped] == [5, 2, 3]
    assert pairs.data.report.lines() == ["rows.jsonl: 2 rows kept, 3 dropped (2 too long, 1 refused by the template)"]
    cut = encode_pairs(rows[:4], chatml, max_length=120, truncation="right")
    assert cut.data.lengths.max() == 120
    assert np.array_equal(cut.data.arrays(2)[0], chatml.encode(rows[1].messages).input_ids[:120])
    assert len(cut) == 4
    left = encode_pairs(rows[:4], chatml, max_length=120, truncation="left")
    assert left.data[2].input_ids == chatml.encode(rows[1].messages).input_ids[-120:]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_cached_pairs_are_those_in_memory(chatml: ChatTemplate, tmp_path: Path, num_proc: int) -> None:
    rows = [make_row(i + 1, i % 5, i % 7) for i in range(1300 if num_proc > 1 else 40)] + [make_row(1301, 60, 1)]
    memory = encode_pairs(rows, chatml, max_length=120)
    seen: list[tuple[int, int]] = []
    sink = CacheSink(tmp_path / "pairs" / "train", chatml.identity(), [], mode="rlhf")
    made = encode_pairs(rows, chatml, max_length=120, num_proc=num_proc, progress=lambda done, total: seen.append((done, total)), sink=sink)
    assert seen[-1] == (len(rows), len(rows))
    mapped = load_pairs([str(tmp_path / "pairs")])
    for pairs in (made, mapped):
        assert len(pairs) == len(memory) == len(rows) - 1
        assert list(pairs.data) == list(memory.data)
        assert np.array_equal(pairs.groups, memory.groups)
        assert pairs.data.fingerprint() == memory.data.fingerprint()
        assert isinstance(pairs.data.arrays(0)[0], np.memmap)
    assert micro_batches(mapped, True, 2) == micro_batches(memory, True, 2)
    some = load_pairs([str(tmp_path / "pairs#5"), str(tmp_path / "pairs#3")], shuffle=False)
    assert len(some) == 8
    assert list(some.data) == [*list(memory.data)[:10], *list(memory.data)[:6]]
    drawn = load_pairs([f"{tmp_path / 'pairs'}#{2 * len(memory)}"], seed=1)
    lines = [drawn.data.where(i) for i in range(len(drawn.data))]
    assert lines[::2] == lines[1::2]
    assert all(count == 4 for count in Counter(lines).values())


def test_pairs_are_not_taken_for_rows_and_rows_not_for_pairs(chatml: ChatTemplate, tmp_path: Path) -> None:
    encode_pairs([make_row(1, 1, 1)], chatml, sink=CacheSink(tmp_path / "pairs", {}, [], mode="rlhf"))
    encode_dataset([make_row(1, 1, 1)], chatml, sink=CacheSink(tmp_path / "rows", {}, []))
    with pytest.raises(DataError, match=r"pairs holds preference rows, wanted rows of one answer; .* --template_mode train$"):
        open_cached(tmp_path / "pairs")
    with pytest.raises(DataError, match=r"rows holds rows of one answer, wanted preference rows; .* --template_mode rlhf$"):
        load_pairs([str(tmp_path / "rows")])


def test_a_pair_that_is_none_is_one_line(chatml: ChatTemplate) -> None:
    with pytest.raises(DataError, match=r"^rows.jsonl:1: the rejected answer is missing"):
        encode_pairs([Row(make_row(1, 1, 1).messages, {}, "rows.jsonl", 1)], chatml)
    with pytest.raises(DataError, match=r"all 1 rows exceed max_length 9"):
        encode_pairs([make_row(1, 1, 1)], chatml, max_length=9)
    pairs = encode_pairs([make_row(1, 1, 1), make_row(2, 1, 1)], chatml)
    with pytest.raises(ValueError, match="other groups"):
        Batches(pairs.data, micro_batch_size=1, global_batch_size=1, packs=PackIndex(pairs.data.lengths, 200), groups=pairs.groups)
    with pytest.raises(DataError, match="group of rows that belong together"):
        PackIndex(pairs.data.lengths, int(pairs.data.lengths.max()), groups=pairs.groups)
