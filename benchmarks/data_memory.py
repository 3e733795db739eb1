"""Resident memory over one epoch: a cached data set in mapped memory, in the order of training, and a file of lines that is streamed.

Rows are made up (16 to 48 tokens; lines of about 60 bytes). Memory is what Linux counts for the process: its own pages and those of mapped files.
The last line is JSON: for each way the rows, the seconds, and resident memory in MiB after a tenth of the epoch, at the end, and at most.

Usage: python benchmarks/data_memory.py --folder SCRATCH [--rows 10000000] [--stream_rows 10000000] [--plot docs/data_memory.png]
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Curve: TypeAlias = list[tuple[float, float, float]]
"""(share of the epoch, MiB of its own, MiB of mapped files)."""
BATCH, MICRO, POINTS = 4096, 64, 200


def resident() -> tuple[float, float]:
    """MiB of this process: its own pages, and pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    own, mapped = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[index]
    return own, mapped


def write_cached(folder: Path, rows: int) -> Path:
    """A cached data set of made-up tokens."""
    from mswift.data.cache import CacheSink
    from mswift.data.report import LengthReport
    from mswift.data.rows import Row

    target, rng, row = folder / f"cached-{rows}", np.random.default_rng(0), Row([], {}, "made up", 1)
    if target.exists():
        return target
    sink, chunk = CacheSink(target, {}, []), 100_000
    for begin in range(0, rows, chunk):
        lengths = rng.integers(16, 49, min(chunk, rows - begin))
        total = int(lengths.sum())
        sink.add(rng.integers(0, 50_000, total, np.int32), np.ones(total, np.float32), lengths, [row] * len(lengths))
    sink.finish(LengthReport(None, "delete"))
    return target


def write_lines(folder: Path, rows: int) -> Path:
    target = folder / f"lines-{rows}.jsonl"
    if not target.exists():
        with target.open("w") as file:
            file.writelines(f'{{"query": "what is {i} plus one?", "response": "{i + 1}"}}\n' for i in range(rows))
    return target


def watched(steps: Iterator[Any], count: int) -> Curve:
    """Memory at `POINTS` places of the steps."""
    curve: Curve = []
    every = max(1, count // POINTS)
    for k, _ in enumerate(steps, start=1):
        if k % every == 0 or k == count:
            curve.append((k / count, *resident()))
    return curve


def cached_epoch(folder: Path, rows: int) -> Curve:
    """Every micro batch of one epoch, in the order of training."""
    from mswift.data.batches import Batches
    from mswift.data.cache import open_cached

    batches = Batches(open_cached(write_cached(folder, rows)), micro_batch_size=MICRO, global_batch_size=BATCH)
    return watched((batches.step(k) for k in range(batches.steps_per_epoch)), batches.steps_per_epoch)


def streamed_epoch(folder: Path, rows: int) -> Curve:
    """Every row of one epoch as it is read and parsed, without a tokenizer."""
    from mswift.data.registry import Part
    from mswift.data.shards import open_shards
    from mswift.data.specs import parse_spec
    from mswift.data.streaming import make_plan

    shards = open_shards(Part(parse_spec(str(write_lines(folder, rows)))))
    plan = make_plan([[shards]], [shards.num_rows], global_batch_size=256, buffer_size=10_000)
    steps = ([plan.sources[0].item(ticket.number) for ticket in plan.tickets(k)] for k in range(plan.steps_per_epoch))
    return watched(steps, plan.steps_per_epoch)


def plot(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.2), squeeze=False)
    for axis, (name, curve) in zip(axes[0], curves.items(), strict=True):
        share, own, mapped = (list(column) for column in zip(*curve, strict=True))
        axis.stackplot([100 * value for value in share], own, mapped, labels=["own pages", "pages of mapped files"], colors=["#4477aa", "#ccbb44"])
        axis.set(
            title=name, xlabel="% of the epoch", ylabel="resident MiB", ylim=(0, 1.3 * max(map(sum, zip(own, mapped, strict=True)))), xlim=(0, 100)
        )
        axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--stream_rows", type=int, default=10_000_000)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    curves, found = dict[str, Curve](), []
    for name, measure, rows in (("cached", cached_epoch, options.rows), ("streamed", streamed_epoch, options.stream_rows)):
        if rows:
            begin = time.perf_counter()
            curve = curves[f"{name}, {rows:,} rows"] = measure(options.folder, rows)
            totals = [own + mapped for _, own, mapped in curve]
            tenth = totals[len(totals) // 10]
            row = {"name": name, "rows": rows, "seconds": time.perf_counter() - begin, "at_a_tenth": tenth, "at_the_end": totals[-1]}
            found.append({**row, "most": max(totals)})
            print(", ".join(f"{key} {value:,.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in found[-1].items()), flush=True)
    if options.plot:
        plot(curves, options.plot)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
