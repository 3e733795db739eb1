"""Seconds of a training step of our side under several settings of its threads, the settings in turn; all others are stopped meanwhile.

``1x2`` is one process with two threads, ``2x1`` two data-parallel processes with one thread each. The last line is JSON: rows of ``name,
seconds, ratio`` (medians; ratio: the step as the launcher sets it / with the setting, round by round; above 1 the setting is faster).

Usage: python benchmarks/threads.py --model DIR [--place 1x2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from pathlib import Path

from sft import PLACES, Side
from sides import Case

SETTINGS: dict[str, dict[str, str]] = {
    "as launched": {},
    "OMP_PROC_BIND=true": {"OMP_PROC_BIND": "true"},
    "OMP_WAIT_POLICY=active": {"OMP_WAIT_POLICY": "active"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "a core for each process": {},
}
LEFT_OUT = {"1x2": ("a core for each process",), "2x1": ("OMP_PROC_BIND=true",)}
"""Each of two processes would bind its thread to the same core."""


def start(name: str, case: Case, place: str) -> Side:
    outer = dict(os.environ)
    os.environ.update(SETTINGS[name])
    side = Side("mswift", case, place)
    os.environ.clear()
    os.environ.update(outer)
    if name == "a core for each process":
        for core, process in enumerate(side.processes):
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})
    return side


def send(side: Side, signal_number: int) -> None:
    for process in side.processes:
        assert process.pid is not None
        os.kill(process.pid, signal_number)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--place", choices=sorted(PLACES), default="1x2", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each setting (default: %(default)s)")
    options = parser.parse_args()
    case = Case(options.model, "bfloat16")
    names = [name for name in SETTINGS if name not in LEFT_OUT[options.place]]
    sides: dict[str, Side] = {}
    for name in names:
        sides[name] = start(name, case, options.place)
        send(sides[name], signal.SIGSTOP)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            send(side, signal.SIGCONT)
            seconds = side.step(number)
            send(side, signal.SIGSTOP)
            if number:
                times[name].append(seconds)
        print(f"{number}/{options.rounds}", file=sys.stderr, flush=True)
    rows = []
    for name, side in sides.items():
        send(side, signal.SIGCONT)
        side.end()
        ratios = [usual / own for usual, own in zip(times[names[0]], times[name], strict=True)]
        rows.append({"name": name, "seconds": round(statistics.median(times[name]), 3), "ratio": round(statistics.median(ratios), 3)})
        print(f"{name:28} {rows[-1]['seconds']:8.3f} s  {rows[-1]['ratio']:.3f}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
