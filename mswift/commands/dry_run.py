"""``--dry_run``: what a conversion to Megatron would read, hold and write, printed; nothing is written and no weight is read."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mswift.config import ExportConfig
from mswift.conversion.directories import weight_paths
from mswift.errors import ConversionError
from mswift.log import progress_bar
from mswift.parallel.layout import ParallelLayout

_SAMPLE = 256 * 2**20  # read to see how fast the disk is
_LIBRARIES = 0.4  # GiB that a process holds without a model


def dry_run(config: ExportConfig, directory: Path) -> None:
    """Print every kind of rank with its parameters, bytes, and an estimate of time and memory.

    Raises:
        ConversionError: tensors are missing or unread; the conversion would fail.
    """
    from mswift.commands.session import quiet_libraries

    quiet_libraries()
    from mswift.engines.dry_run import plan_conversion, summary
    from mswift.runtime.device import select

    layout = ParallelLayout.smallest(**config.parallel.sizes())
    with progress_bar("imagining the ranks") as progress:
        plan = plan_conversion(
            directory,
            layout,
            select("cpu"),
            dtype=config.model.torch_dtype,
            trust_remote_code=config.model.trust_remote_code,
            progress=progress,
        )
    print(f"{directory}: {plan.num_tensors} tensors, {plan.source_bytes / 1e9:.3f} GB; layout {layout.describe()}")
    for stage in range(layout.pp):
        kinds = [summary(rank) for rank in plan.ranks if rank.stage == stage]
        first = next(rank for rank in plan.ranks if rank.stage == stage)
        shares = f", each of {layout.ep} shares of the experts" if layout.ep > 1 else ""
        print(f"\nstage {stage}{shares}: {len(first.parameters)} parameters, {first.nbytes / 1e9:.3f} GB on each rank")
        for count, entry in kinds[0]:
            print(f"  {count:>5} x {entry.name} {entry.shape}{entry.split} <- {', '.join(entry.sources) or '(no rule)'}")
        assert all(kind == kinds[0] for kind in kinds), "shares of the experts are equal in kind"
    if plan.problems:
        raise ConversionError(f"{directory} would not be converted: {'; '.join(plan.problems)}")
    largest = max(entry.nbytes for rank in plan.ranks for entry in rank.parameters)
    held = max(rank.nbytes for rank in plan.ranks)
    rate = _read_rate(directory)
    seconds = 2 * plan.source_bytes / rate / min(layout.world, os.cpu_count() or 1)
    print(
        f"\nabout {seconds:.1f} s at the {rate / 1e9:.2f} GB/s at which this disk reads now, written as fast; "
        f"at most {(held + largest) / 2**30 + _LIBRARIES:.2f} GiB of memory in each process\nnothing was written"
    )


def _read_rate(directory: Path) -> float:
    """Bytes a second of the first weights."""
    begun, done = time.perf_counter(), 0
    for path in weight_paths(directory):
        with path.open("rb", buffering=0) as file:
            while done < _SAMPLE and (part := file.read(2**24)):
                done += len(part)
    return max(done, 1) / max(time.perf_counter() - begun, 1e-9)
