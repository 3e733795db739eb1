"""Where a training step goes: the table of docs/kernels.md, by torch's profiler, for transformers + peft, for the Megatron engine on plain torch
(``--kernels reference``) and with its kernels.

Milliseconds of processor time of one step on one thread, self time of every operator summed by what it does, the profiler's own cost included
(mostly in the last group); the fastest of three. The last row is a step without the profiler, the median of some, in turn with the other sides.
The last line is JSON.

Usage: python benchmarks/profile_step.py --model DIR [--dtype bfloat16] [--labelled 0.4] [--rounds 5] [--top 0]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sides import SIDES, Case

from mswift.launch import plan

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mswift::lora", "mswift::grouped")
HEAD = ("_LinearLogProbs", "mswift::linear_softmax", "aten::_log_softmax", "aten::nll_loss", "aten::embedding_dense_backward")
MOVES_NOTHING = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::view", "aten::_unsafe_view", "aten::reshape"),
    *("aten::t", "aten::transpose", "aten::permute", "aten::as_strided", "aten::slice", "aten::select", "aten::split", "aten::chunk"),
    *("aten::to", "aten::_to_copy", "aten::contiguous", "aten::detach", "detach", "aten::expand", "aten::unsqueeze", "aten::squeeze"),
    *("aten::flatten", "aten::narrow", "aten::matmul", "aten::linear", "aten::alias", "aten::resize_", "aten::split_with_sizes"),
}
GROUPS = (
    *("products, LoRA's included", "attention, forward", "attention, backward", "norms, gates, rotations, casts, sums"),
    *("head and loss, products included", "optimizer", "rest (autograd, Python)"),
)


def group_of(event: Any, vocab: int) -> str:
    """What an event of the profiler does, by its name, its shapes and where it lies."""
    forward = event.name.startswith("GeneratedBackwardFor") and not event.name.endswith("Backward")  # of an operator of ours: its forward
    lineage = [event]
    while lineage[-1].cpu_parent is not None:
        lineage.append(lineage[-1].cpu_parent)
    if any(one.name.startswith("Optimizer.step") for one in lineage):
        return GROUPS[5]
    heads = any(one.name.startswith(HEAD) for one in lineage)
    if event.name != "aten::embedding" and (heads or any(vocab in (shape or ()) for shape in event.input_shapes)):
        return GROUPS[4]
    if "attention" in event.name and not event.name.startswith("autograd::"):
        return GROUPS[2] if "ackward" in event.name and not forward else GROUPS[1]
    if event.name.startswith(PRODUCTS):
        return GROUPS[0]
    if event.name in MOVES_NOTHING or not (forward or event.name.startswith(("aten::", "mswift::"))):
        return GROUPS[6]
    return GROUPS[3]


def profiled(step: Any, vocab: int, top: int, times: int = 3) -> dict[str, float]:
    """Milliseconds of one step by group: of the fastest of some, since whatever else the machine does only adds."""
    from torch.profiler import ProfilerActivity, profile, record_function

    found: list[tuple[dict[str, float], dict[tuple[str, str], list[float]]]] = []
    for _ in range(times):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
            with record_function("step"):
                step(99)
        spent: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
        by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in run.events():
            group = group_of(event, vocab)
            spent[group] += event.self_cpu_time_total / 1e3
            by_name[group, event.name].append(event.self_cpu_time_total / 1e3)
        found.append((spent, by_name))
    spent, by_name = min(found, key=lambda one: sum(one[0].values()))
    for (group, name), parts in sorted(by_name.items(), key=lambda entry: -sum(entry[1]))[:top]:
        print(f"    {sum(parts):8.1f} ms {len(parts):6d} x  {name}  [{group}]", flush=True)
    return spent


def serve(pipe: Connection, name: str, case: Case, top: int) -> None:
    """Build one side, then do a step for each ``True`` received and answer with its processor time; at the end answer with its profile."""
    step = SIDES[name](case)
    vocab = json.loads((case.model / "config.json").read_text(encoding="utf8"))["vocab_size"]
    step(0)
    pipe.send("ready")
    while pipe.recv():
        start = time.process_time()
        step(1)
        pipe.send(time.process_time() - start)
    pipe.send({} if name == "bare products" else profiled(step, vocab, top))


def measure(sides: dict[str, tuple[str, Case]], rounds: int, top: int) -> dict[str, tuple[dict[str, float], float]]:
    """Of each side: milliseconds by group, and those of a step without the profiler."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for label, (name, case) in sides.items():
        pipes[label], there = context.Pipe()
        context.Process(target=serve, args=(there, name, case, top), daemon=True).start()
        pipes[label].recv()
    times: dict[str, list[float]] = {label: [] for label in sides}
    for _ in range(rounds):
        for label, pipe in pipes.items():
            pipe.send(True)
            times[label].append(pipe.recv())
    found = {}
    for label, pipe in pipes.items():
        if top:
            print(label)
        pipe.send(False)
        found[label] = (pipe.recv(), 1e3 * statistics.median(times[label]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--labelled", type=float, default=0.4, help="share of labelled tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps without the profiler (default: %(default)s)")
    parser.add_argument("--top", type=int, default=0, help="print so many operators of each side (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names of sides: transformers, before, with, bare")
    options = parser.parse_args()
    os.environ.update({**plan("sft", [], dict(os.environ), 1).env, "OMP_NUM_THREADS": "1"})  # type: ignore[union-attr]
    case = Case(options.model, options.dtype, labelled=options.labelled)
    sides = {
        "transformers + peft": ("transformers+peft", case),
        "before (--kernels reference)": ("mswift", dataclasses.replace(case, kernels="reference")),
        "with kernels": ("mswift", case),
        "bare products": ("bare products", case),
    }
    found = measure({label: side for label, side in sides.items() if label.startswith(tuple(options.only))}, options.rounds, options.top)
    shown = [label for label in found if label != "bare products"]
    print(f"| part, ms | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}")
    for group in GROUPS:
        print(f"| {group} | {' | '.join(f'{found[label][0][group]:,.0f}' for label in shown)} |")
    print(f"| **step, not profiled** | {' | '.join(f'**{found[label][1]:,.0f}**' for label in shown)} |")
    if "bare products" in found:
        print(f"bare products: {found['bare products'][1]:,.0f} ms")
    rows = [{"name": label, "step_ms": round(step), **{k: round(v, 1) for k, v in groups.items()}} for label, (groups, step) in found.items()]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
