"""Rates of the data path: rows to tokens, masks and packs beside `tokenizers` encoding the same texts alone, and the index of packs.

Both sides run in turn in one process on the same texts, which are cut from the docstrings of Python's standard library. The index is made in a
process of its own, whose peak memory is measured. The last line is JSON: rows of ``name, ours, peer, peer_name, ratio`` (rows/s and the ratio
of the medians of the pairs; for the index seconds, GiB and the share of empty places beside their limits).

Usage: python benchmarks/data.py --model DIR [--rows 200000] [--pairs 3] [--num_proc 1] [--lengths 10000000] [--packing_length 8192]
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

SECONDS, GIB, WASTE = 20.0, 2.0, 0.01

INDEX = """
import json, resource, sys, time
import numpy as np
from mswift.data.packing import PackIndex
count, capacity = int(sys.argv[1]), int(sys.argv[2])
lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 1.1, count), 8, capacity).astype(np.int64)
begun = time.perf_counter()
index = PackIndex(lengths, capacity)
packs = index.of_epoch(0)
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([seconds, peak, index.waste(packs)]))
"""


def words() -> list[str]:
    """The words of the docstrings of the standard library, in order."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found += (ast.get_docstring(node) or "").split()
    return found


def make_rows(count: int, seed: int = 0) -> list[Any]:
    """Conversations of one to three turns, of some 400 tokens."""
    from mswift.data import Row

    draw, text, rows = random.Random(seed), words(), []
    for line in range(count):
        messages = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            start, question, answer = draw.randrange(len(text) - 400), draw.randint(5, 40), draw.randint(20, 200)
            messages.append({"role": "user", "content": " ".join(text[start : start + question]) + "?"})
            messages.append({"role": "assistant", "content": " ".join(text[start + question : start + question + answer])})
        rows.append(Row(messages, {}, "rows", line + 1))
    return rows


def tokens(model: Path, count: int, pairs: int, num_proc: int, capacity: int) -> dict[str, Any]:
    """Rows per second from messages to packs, and of the tokenizer alone on the rendered texts."""
    from transformers import AutoTokenizer

    from mswift.data import encode_dataset
    from mswift.data.encoding import to_conversation
    from mswift.data.packing import PackIndex
    from mswift.templates import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = ChatTemplate(tokenizer)
    rows = make_rows(count)
    texts = [template.render(to_conversation(row)) for row in rows]
    backend = tokenizer.backend_tokenizer
    backend.encode_batch(texts[:500], add_special_tokens=False)
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        begun = time.perf_counter()
        data = encode_dataset(rows, template, max_length=capacity, num_proc=num_proc)
        packs = PackIndex(data.lengths, capacity).of_epoch(0)
        middle = time.perf_counter()
        made = backend.encode_batch(texts, add_special_tokens=False)
        times.append((middle - begun, time.perf_counter() - middle))
        assert sum(len(one) for one in made) == data.num_tokens
        del made
        print(
            f"pair {pair + 1}/{pairs}: {times[-1][0]:.2f} s and {times[-1][1]:.2f} s, {data.num_tokens} tokens, {len(packs)} packs", file=sys.stderr
        )
    ours, peer = (count / statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(peer_s / ours_s for ours_s, peer_s in times)
    name = f"tokenise, mask and pack {count} chat rows, rows/s, {num_proc} processes"
    return {"name": name, "ours": round(ours), "peer": round(peer), "peer_name": "tokenizers encode_batch", "ratio": round(ratio, 3)}


def index(count: int, capacity: int) -> list[dict[str, Any]]:
    """Seconds, peak memory and waste of the packs of so many rows, beside their limits."""
    done = subprocess.run([sys.executable, "-c", INDEX, str(count), str(capacity)], capture_output=True, text=True, check=True)
    found = zip(("seconds", "peak GiB", "empty share"), json.loads(done.stdout), (SECONDS, GIB, WASTE), strict=True)
    return [
        {"name": f"packs of {count} rows: {what}", "ours": round(value, 6), "peer": limit, "peer_name": "limit", "ratio": round(limit / value, 1)}
        for what, value, limit in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a chat model; its tokenizer and template are used")
    parser.add_argument("--rows", type=int, default=200_000, help="chat rows (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="counted pairs (default: %(default)s)")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that turn rows into tokens (default: %(default)s)")
    parser.add_argument("--lengths", type=int, default=10_000_000, help="rows of the index of packs (default: %(default)s)")
    parser.add_argument("--packing_length", type=int, default=8192, help="tokens of a pack (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [tokens(arguments.model, arguments.rows, arguments.pairs, arguments.num_proc, arguments.packing_length)]
    rows += index(arguments.lengths, arguments.packing_length)
    print("ms-swift is not compared: this program does not install it", file=sys.stderr)
    print(f"{'':72}{'mswift':>12}{'peer':>12}{'ratio':>8}")
    for row in rows:
        print(f"{row['name']:72}{row['ours']:>12}{row['peer']:>12}{row['ratio']:>8}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
