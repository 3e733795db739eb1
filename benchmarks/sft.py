"""Tokens per second and peak memory of LoRA fine-tuning: the Megatron engine beside transformers + peft, at the same shapes, step by step in turn.

Every side lives in processes of its own, and waits while another one computes. ``1x2`` is one process with two threads, ``2x1`` two
data-parallel processes with one thread each (the peer: torch's DistributedDataParallel over gloo). Ours starts with the settings that the
launcher of mswift gives it, the peer with those that its user has. Beside both run the bare matrix products of the step, which no engine can
leave out: `limit`. Memory is the largest resident set of each process, summed, from its start to its end. The last line is JSON: rows of
``name, ours, peer, peer_name, ratio, limit, limit_ratio, ours_mib, peer_mib, memory_ratio`` (tokens/s; ratios: ours / the other, medians of
the rounds; of memory: ours / peer).

Usage: python benchmarks/sft.py --model DIR [--only bfloat16/40%/1x2 ...] [--rounds 7] [--ms_swift PYTHON]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sides import SIDES, Case, peak_mib

from mswift.launch import plan

MS_SWIFT = "ms-swift"
PLACES = {"1x2": (1, 2), "2x1": (2, 1)}
"""Name -> processes, threads of each."""


def serve(pipe: Connection, name: str, case: Case, env: dict[str, str]) -> None:
    """Build one process of a side, then answer every number received with the loss of one step; at the end with its memory."""
    os.environ.update(env)
    step = SIDES[name](case)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        pipe.send(step(number))
    pipe.send(peak_mib())


class Program:
    """sft_ms_swift.py in another interpreter, spoken to as through a pipe."""

    def __init__(self, python: Path, case: Case, env: dict[str, str]) -> None:
        command = [python, Path(__file__).with_name("sft_ms_swift.py"), case.model, case.dtype, case.batch, case.length, case.labelled]
        outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [str(part) for part in command], env={**outer, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def send(self, number: int | None) -> None:
        assert self.process.stdin is not None
        if number is None:
            self.process.stdin.close()
        else:
            print(number, file=self.process.stdin, flush=True)

    def recv(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                word = line.split()[1]
                return word if word == "ready" else float(word)
        raise SystemExit("error: ms-swift's side ended; what it said is above")


class Side:
    """The processes of one side.

    Args:
        python: the interpreter of ms-swift, where that is the side.
    """

    def __init__(self, name: str, case: Case, place: str, python: Path | None = None) -> None:
        processes, threads = PLACES[place]
        self.pipes: list[Connection | Program] = []
        self.processes: list[BaseProcess] = []
        self.losses: list[float] = []
        context = multiprocessing.get_context("spawn")
        outer = dict(os.environ)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a process starts, as the allocator's settings are
        if name == "mswift":
            found = plan("sft", [], {**os.environ, "NPROC_PER_NODE": str(processes)}, processes * threads)
            os.environ.update(found.env if found is not None else {})
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        for rank in range(processes):
            here, there = context.Pipe()
            env = {**common, "RANK": str(rank)} if processes > 1 else {}
            if name == MS_SWIFT:
                assert python is not None
                self.pipes.append(Program(python, case, env))
                continue
            process = context.Process(target=serve, args=(there, name, case, env), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        os.environ.clear()
        os.environ.update(outer)
        for pipe in self.pipes:
            pipe.recv()

    def step(self, number: int) -> float:
        """Seconds until the last process is done."""
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(number)
        losses = [pipe.recv() for pipe in self.pipes]
        self.losses.append(losses[0])
        return time.perf_counter() - start

    def end(self) -> float:
        """MiB of all processes."""
        for pipe in self.pipes:
            pipe.send(None)
        memory = sum(pipe.recv() for pipe in self.pipes)
        for process in self.processes:
            process.join()
        return memory


def compare(name: str, case: Case, place: str, rounds: int, python: Path | None) -> list[dict[str, Any]]:
    """All sides in turn; the first step of each is a warm-up and not counted. One row for each peer."""
    sides = {label: Side(label, case, place, python) for label in (*SIDES, *([MS_SWIFT] if python else []))}
    times: dict[str, list[float]] = {label: [] for label in sides}
    for number in range(rounds + 1):
        for label, side in sides.items():
            seconds = side.step(number)
            if number:
                times[label].append(seconds)
        told = "  ".join(f"{label} {side.losses[-1]:.4f}" for label, side in sides.items() if any(side.losses))
        print(f"{name} {number}/{rounds}: losses {told}", file=sys.stderr, flush=True)
    memory = {label: side.end() for label, side in sides.items()}

    def speed(label: str) -> float:
        return round(case.tokens / statistics.median(times[label]), 1)

    def ratio(label: str) -> float:
        return round(statistics.median(other / own for own, other in zip(times["mswift"], times[label], strict=True)), 3)

    common = {"ours_mib": round(memory["mswift"]), "limit": speed("bare products"), "limit_ratio": ratio("bare products")}
    return [
        {
            "name": name,
            "ours": speed("mswift"),
            "peer": speed(label),
            "peer_name": label,
            "ratio": ratio(label),
            **common,
            "peer_mib": round(memory[label]),
            "memory_ratio": round(memory["mswift"] / memory[label], 3),
        }
        for label in sides
        if label not in ("mswift", "bare products")
    ]


def cases(base: Case) -> Iterator[tuple[str, Case, str]]:
    for dtype in ("bfloat16", "float32"):
        for labelled in (0.4, 1.0):
            for place in PLACES:
                yield f"{dtype}/{labelled:.0%}/{place}", replace(base, dtype=dtype, labelled=labelled), place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names of cases, such as bfloat16/40%%/1x2 (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each side (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a row (default: %(default)s)")
    parser.add_argument("--ms_swift", type=Path, help="a Python interpreter that has ms-swift, to be compared too")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="of our side, where it has two processes (default: %(default)s)")
    options = parser.parse_args()
    base = Case(options.model, "bfloat16", options.batch, options.length, tensor_parallel=options.tensor_parallel)
    rows: list[dict[str, Any]] = []
    for name, case, place in cases(base):
        if name.startswith(tuple(options.only)):
            found = compare(name, case, place, options.rounds, options.ms_swift)
            rows += found
            for row in found:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
