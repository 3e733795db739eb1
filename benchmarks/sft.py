"""Tokens per second of LoRA fine-tuning: the Megatron engine beside transformers + peft, at the same shapes, step by step in turn.

Each side lives in a process of its own (the CPU runtime of one must not serve the other) and waits while the other one computes. The last
line is JSON: rows of ``name, ours, peer, peer_name, ratio`` (tokens/s; ratio of the medians of the pairs).

Usage: python benchmarks/sft.py --model DIR [--dtypes float32 bfloat16] [--pairs 5] [--batch 2] [--length 512] [--labelled 1.0 0.4]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, SEED = 8, 32, 1e-4, 0


def make_batch(vocab: int, batch: int, length: int, labelled: float) -> tuple[Any, Any]:
    """Random tokens ``[b, s + 1]`` and which of them are labels, the same on both sides."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocab, (batch, length + 1), generator=generator)
    return ids, torch.rand(batch, length, generator=generator) < labelled


def ours(model: Path, dtype: str, batch: int, length: int, labelled: float) -> Callable[[int], float]:
    """A function that does one optimizer step with the Megatron engine and returns its loss."""
    import torch

    from mswift.data.batches import IGNORED_LABEL, MicroBatch
    from mswift.engines.megatron import MegatronEngine, OptimizerSettings
    from mswift.engines.megatron_model import BuildSettings, MegatronModel
    from mswift.objectives.sft import SupervisedObjective
    from mswift.parallel.groups import make_groups
    from mswift.parallel.layout import ParallelLayout
    from mswift.runtime.device import init_processes, select
    from mswift.tuners.lora import LoraSettings

    runtime = select("cpu")
    init_processes(runtime)
    built = MegatronModel(BuildSettings(model, dtype=dtype), make_groups(ParallelLayout()), runtime)
    built.add_lora(LoraSettings(rank=RANK, alpha=ALPHA, dropout=0.0))
    engine = MegatronEngine(built, OptimizerSettings(learning_rate=LEARNING_RATE, weight_decay=0.0), seed=SEED, source=str(model))
    ids, chosen = make_batch(built.description.vocab_size, batch, length, labelled)
    labels = ids[:, 1:].masked_fill(~chosen, IGNORED_LABEL)
    positions = torch.arange(length).expand(batch, -1).contiguous()
    micro = MicroBatch(ids[:, :-1].contiguous(), labels, chosen.float(), positions, 0, batch * length, list(range(batch)))
    objective = SupervisedObjective()
    return lambda step: engine.train_step([micro], objective, step=step, learning_rate=LEARNING_RATE).loss


def peer(model: Path, dtype: str, batch: int, length: int, labelled: float) -> Callable[[int], float]:
    """The same with transformers (SDPA) and peft, gradient clipping included."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.utils.logging.set_verbosity_error()
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    tuned = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    ids, chosen = make_batch(base.config.vocab_size, batch, length, labelled)
    labels = torch.cat([torch.full((batch, 1), -100), ids[:, 1:].masked_fill(~chosen, -100)], dim=1)[:, : length + 1]
    tuned.train()

    def step(_number: int) -> float:
        loss = tuned(input_ids=ids[:, : length + 1], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def serve(pipe: Connection, make: Callable[..., Callable[[int], float]], arguments: tuple[Any, ...]) -> None:
    """Build one side, then answer every number received with (seconds, loss) of one step."""
    step = make(*arguments)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        loss = step(number)
        pipe.send((time.perf_counter() - start, loss))


def compare(model: Path, dtype: str, batch: int, length: int, labelled: float, pairs: int) -> dict[str, Any]:
    """Run both sides in turn; the first step of each is a warm-up and not counted."""
    context = multiprocessing.get_context("spawn")
    sides = []
    for make in (ours, peer):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, make, (model, dtype, batch, length, labelled)), daemon=True)
        process.start()
        assert here.recv() == "ready"
        sides.append((here, process))
    times: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    for number in range(pairs + 1):
        for side, (pipe, _) in enumerate(sides):
            pipe.send(number)
            seconds, loss = pipe.recv()
            losses[side].append(loss)
            if number:
                times[side].append(seconds)
        print(f"{dtype} {labelled:.0%} labelled, pair {number}/{pairs}: losses {losses[0][-1]:.5f} {losses[1][-1]:.5f}", file=sys.stderr)
    for pipe, process in sides:
        pipe.send(None)
        process.join()
    tokens = batch * length
    mine, other = (tokens / statistics.median(side) for side in times)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    name = f"lora r{RANK} {dtype} {batch}x{length} {labelled:.0%} labelled tokens/s"
    return {"name": name, "ours": round(mine, 1), "peer": round(other, 1), "peer_name": "transformers+peft", "ratio": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--labelled", nargs="+", type=float, default=[1.0, 0.4], help="shares of labelled tokens (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens a row (default: %(default)s)")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    rows = [
        compare(arguments.model, dtype, arguments.batch, arguments.length, labelled, arguments.pairs)
        for dtype in arguments.dtypes
        for labelled in arguments.labelled
    ]
    print(f"{'':52}{'mswift':>10}{'peer':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row['name']:52}{row['ours']:>10}{row['peer']:>10}{row['ratio']:>8}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
