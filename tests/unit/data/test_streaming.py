"""Every row once an epoch, whoever reads it: over numbers of ranks, resumed on others, with sources mixed by their shares."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mswift.data.files import RawRow
from mswift.data.registry import Part
from mswift.data.shards import open_shards
from mswift.data.specs import parse_spec
from mswift.data.streaming import StreamPlan, Ticket, make_plan


def write(path: Path, count: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"{path.parent.name}/{path.name}:{i}"} for i in range(count)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=17)
    elif path.suffix == ".gz":
        with pyarrow.output_stream(str(path), compression="gzip") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plan_of(*locations: str, batch: int = 8, wanted: list[int] | None = None, **options: object) -> StreamPlan:
    shards = [[open_shards(Part(parse_spec(location)))] for location in locations]
    sizes = [sum(one.num_rows for one in part) for part in shards]
    return make_plan(shards, wanted or sizes, global_batch_size=batch, **options)  # type: ignore[arg-type]


def read(plan: StreamPlan, ticket: Ticket) -> str:
    item, _ = plan.sources[ticket.source].item(ticket.number)
    assert isinstance(item, RawRow)
    return item.data["id"]


def run(plan: StreamPlan, begin: int, end: int, micro: int, dp: int) -> list[list[str]]:
    """The rows of each step, over all ranks, each of which has its own plan as in a process of its own."""
    steps = []
    for k in range(begin, end):
        dealt = plan.dealt(k, micro, dp)
        assert len({len(rank) for rank in dealt}) == 1, "ranks have equally many micro batches"
        assert all(len(rows) <= micro for rank in dealt for rows in rank)
        steps.append([read(plan, ticket) for rank in dealt for rows in rank for ticket in rows])
    return steps


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, count in (("a.jsonl", 101), ("b.jsonl", 3), ("c.jsonl", 70)):
        write(tmp_path / "data" / name, count)
    return str(tmp_path / "data")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once(suffix: str, shuffle: bool, tmp_path: Path) -> None:
    for i, count in enumerate((90, 1, 45)):
        write(tmp_path / f"{i}{suffix}", count)
    plan = plan_of(str(tmp_path), batch=16, buffer_size=40, shuffle=shuffle)
    assert plan.steps_per_epoch == 9
    epochs = [[row for step in run(plan, e * 9, e * 9 + 9, 2, 2) for row in step] for e in range(3)]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == 136
    assert (epochs[0] == epochs[1]) is not shuffle
    assert (epochs[0] == sorted(epochs[0], key=lambda name: (name.split(":")[0], int(name.split(":")[1])))) is not shuffle


@pytest.mark.parametrize(("dp", "then", "micro"), [(1, 4, 1), (2, 4, 2), (4, 1, 1), (4, 3, 2), (8, 2, 1)])
def test_resumed_on_another_number_of_ranks_every_row_comes_once(dp: int, then: int, micro: int, folder: str) -> None:
    options = {"batch": 8, "buffer_size": 24, "seed": 3}
    straight = run(plan_of(folder, **options), 0, 44, 1, 1)  # type: ignore[arg-type]
    assert plan_of(folder, **options).steps_per_epoch == 22  # type: ignore[arg-type]
    first = run(plan_of(folder, **options), 0, 13, micro, dp)  # type: ignore[arg-type]
    second = run(plan_of(folder, **options), 13, 44, micro, then)  # type: ignore[arg-type]
    assert [sorted(step) for step in first + second] == [sorted(step) for step in straight]
    epochs = [Counter(row for step in (first + second)[begin : begin + 22] for row in step) for begin in (0, 22)]
    assert all(len(epoch) == 174 and set(epoch.values()) == {1} for epoch in epochs)


def test_ranks_read_their_own_lanes(folder: str) -> None:
    plan = plan_of(folder, batch=8, buffer_size=24)
    readers: dict[int, set[int]] = {}
    for k in range(plan.steps_per_epoch):
        for rank, batches in enumerate(plan.dealt(k, 1, 4)):
            for ticket in (ticket for rows in batches for ticket in rows):
                readers.setdefault(plan.sources[0].lane_of(ticket.number), set()).add(rank)
    assert len(readers) == 8
    assert all(len(ranks) == 1 for ranks in readers.values())
    assert Counter(next(iter(ranks)) for ranks in readers.values()) == dict.fromkeys(range(4), 2)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 120)), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_sources_by_their_shares(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], batch: int, dp: int, micro: int, shuffle: bool
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    names = [write(folder / f"{i}" / "a.jsonl", size) for i, (size, _) in enumerate(pairs)]
    wanted = [quota for _, quota in pairs]
    plan = plan_of(*names, batch=batch, wanted=wanted, buffer_size=20, shuffle=shuffle, by_share=True)
    steps = run(plan, 0, 2 * plan.steps_per_epoch, micro, dp)
    owners = [Counter(int(row.split("/")[0]) for row in step) for step in steps]
    for epoch in range(2):
        part = owners[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sum(part, Counter()) == Counter(dict(enumerate(wanted)))
    total = Counter(row for step in steps for row in step)
    for i, (size, quota) in enumerate(pairs):
        counts = [count for row, count in total.items() if row.startswith(f"{i}/")]
        assert max(counts) - (min(counts) if len(counts) == size else 0) <= 1, "no row comes again before all came"
        assert sum(counts) == 2 * quota
    for k, found in enumerate(np.cumsum([[owner[i] for i in range(len(pairs))] for owner in owners], axis=0).tolist(), start=1):
        assert plan.positions(k) == found
        share = (k % plan.steps_per_epoch or plan.steps_per_epoch) * batch / plan.rows_per_epoch
        if k <= plan.steps_per_epoch and share <= 1:
            assert all(abs(count - share * quota) <= 1 + len(pairs) for count, quota in zip(found, wanted, strict=True))


def test_the_order_depends_on_seed_and_files_alone(folder: str) -> None:
    first = plan_of(folder, seed=1, buffer_size=24)
    assert run(first, 5, 9, 1, 1) == run(plan_of(folder, seed=1, buffer_size=24), 5, 9, 1, 1), "no step depends on the steps before it"
    assert run(first, 0, 4, 1, 1) != run(plan_of(folder, seed=2, buffer_size=24), 0, 4, 1, 1)
    assert first.fingerprint() == plan_of(folder, seed=1, buffer_size=24).fingerprint()
    assert first.fingerprint() != plan_of(folder, seed=2, buffer_size=24).fingerprint()
    write(Path(folder) / "a.jsonl", 102)
    assert first.fingerprint() != plan_of(folder, seed=1, buffer_size=24).fingerprint()
