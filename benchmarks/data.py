"""Rates of the data path: rows to tokens, masks and packs beside `tokenizers` encoding the same texts alone, and the index of packs.

All sides run in turn on the same texts, which are cut from the docstrings of Python's standard library. The index is made in a process of its
own, whose peak memory is measured. ms-swift is compared in an interpreter of its own (data_ms_swift.py). The last line is JSON: rows of
``name, ours, peer, peer_name, ratio`` (rows/s and the median of the ratios of the pairs; for the index seconds, GiB and the share of empty places
beside their limits).

Usage: python benchmarks/data.py --model DIR [--rows 200000] [--pairs 3] [--lengths 10000000] [--packing_length 8192] [--ms_swift PYTHON]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
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


def tokens(model: Path, count: int, pairs: int, num_proc: int, capacity: int) -> list[dict[str, Any]]:
    """Rows per second from messages to packs, and of the tokenizer alone on the rendered texts: with places in the text, and without."""
    from transformers import AutoTokenizer

    from mswift.data.encoding import to_conversation
    from mswift.templates import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = ChatTemplate(tokenizer)
    rows = make_rows(count)
    texts = [template.render(to_conversation(row)) for row in rows]
    backend = tokenizer.backend_tokenizer
    peers = {"tokenizers encode_batch": backend.encode_batch, "tokenizers encode_batch_fast": backend.encode_batch_fast}
    backend.encode_batch(texts[:500], add_special_tokens=False)
    times: list[list[float]] = []
    for pair in range(pairs):
        seconds, num_tokens, num_packs = ours(rows, template, capacity, num_proc)
        times.append([seconds])
        for encode in peers.values():
            begun, made = time.perf_counter(), 0
            for first in range(0, count, 1024):  # all at once is slower: it fills gigabytes of memory with what is not asked for
                made += sum(map(len, encode(texts[first : first + 1024], add_special_tokens=False)))
            times[-1].append(time.perf_counter() - begun)
            assert made == num_tokens
        said = ", ".join(f"{value:.2f} s" for value in times[-1])
        print(f"{pair + 1}/{pairs}: {said}; {num_tokens} tokens, {num_packs} packs", file=sys.stderr)
    name = f"tokenise, mask and pack {count} chat rows, rows/s, {num_proc} processes"
    return [compared(name, count, [(one[0], one[1 + i]) for one in times], peer) for i, peer in enumerate(peers)]


def ours(rows: list[Any], template: Any, capacity: int, num_proc: int) -> tuple[float, int, int]:
    """Seconds, tokens and packs of these rows."""
    from mswift.data import encode_dataset
    from mswift.data.packing import PackIndex

    begun = time.perf_counter()
    data = encode_dataset(rows, template, max_length=capacity, num_proc=num_proc)
    packs = PackIndex(data.lengths, capacity).of_epoch(0)
    return time.perf_counter() - begun, data.num_tokens, len(packs)


def compared(name: str, count: int, times: list[tuple[float, float]], peer: str) -> dict[str, Any]:
    """A row of the result from pairs of seconds (ours, the peer's)."""
    mine, other = (count / statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(peer_s / ours_s for ours_s, peer_s in times)
    return {"name": name, "ours": round(mine), "peer": round(other), "peer_name": peer, "ratio": round(ratio, 3)}


def ms_swift(python: Path, model: Path, count: int, pairs: int, capacity: int) -> dict[str, Any]:
    """The same against ms-swift in its own interpreter, with as many processes as there are cores; ours is one, whose tokenizer uses them all."""
    from transformers import AutoTokenizer

    from mswift.templates import ChatTemplate

    rows, template = make_rows(count), ChatTemplate(AutoTokenizer.from_pretrained(model))
    system = template.render([{"role": "user", "content": "x"}]).split("system\n", 1)[1].split("<|im_end|>", 1)[0]
    times = []
    with tempfile.TemporaryDirectory() as folder:
        path, program = Path(folder) / "rows.jsonl", Path(__file__).with_name("data_ms_swift.py")
        path.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in rows), encoding="utf8")
        command = [str(python), str(program), str(model), str(path), system, str(capacity), str(os.cpu_count())]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            next(line for line in child.stdout if line == "ready\n")
            for _ in range(pairs):
                seconds, num_tokens, num_packs = ours(rows, template, capacity, 1)
                print("go", file=child.stdin, flush=True)
                other, other_tokens, other_packs = json.loads(next(line for line in child.stdout if line.startswith("[")))
                times.append((seconds, other))
                print(
                    f"{seconds:.2f} s, {num_tokens} tokens, {num_packs} packs; ms-swift {other:.2f} s, {other_tokens}, {other_packs}", file=sys.stderr
                )
            child.stdin.close()
    return compared(f"tokenise, mask and pack {count} chat rows, rows/s", count, times, f"ms-swift, {os.cpu_count()} processes")


def index(count: int, capacity: int) -> list[dict[str, Any]]:
    """Seconds, peak memory and waste of the packs of so many rows, beside their limits."""
    done = subprocess.run([sys.executable, "-c", INDEX, str(count), str(capacity)], capture_output=True, text=True, check=True)
    found = zip(("seconds", "peak GiB", "empty share"), json.loads(done.stdout), (SECONDS, GIB, WASTE), strict=True)
    return [
        {"name": f"packs of {count} rows: {what}", "ours": round(value, 6), "peer": limit, "peer_name": "limit", "ratio": round(limit / value, 1)}
        for what, value, limit in found
    ]


def stream(model: Path, count: int, pairs: int) -> dict[str, Any]:
    """Rows per second of one process that reads, parses, tokenises and collates a stream, beside the tokenizer alone on the same texts."""
    from transformers import AutoTokenizer

    from mswift.data.encoding import to_conversation
    from mswift.data.loading import ReadSettings
    from mswift.data.registry import Part
    from mswift.data.shards import open_shards
    from mswift.data.specs import parse_spec
    from mswift.data.stream_batches import BatchShape, StreamBatches
    from mswift.data.streaming import make_plan
    from mswift.templates import ChatTemplate

    template, rows, times = ChatTemplate(AutoTokenizer.from_pretrained(model)), make_rows(count), []
    texts = [template.render(to_conversation(row)) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in rows), encoding="utf8")
        shards = open_shards(Part(parse_spec(str(path))))
        for _ in range(pairs):
            plan = make_plan([[shards]], [count], global_batch_size=64)
            batches = StreamBatches(plan, template, ReadSettings({}), BatchShape(8))
            begun = time.perf_counter()
            seen = sum(len(batch.rows) for k in range(batches.steps_per_epoch) for batch in batches.step(k))
            middle = time.perf_counter()
            for first in range(0, count, 64):
                template.tokenizer.backend_tokenizer.encode_batch(texts[first : first + 64], add_special_tokens=False)
            times.append((middle - begun, time.perf_counter() - middle))
            assert seen == count
    return compared(f"stream {count} chat rows in steps of 64, rows/s of a rank", count, times, "tokenizers encode_batch")


def library_lengths(model: Path) -> Any:
    """Tokens of every function and class of Python's standard library: lengths as they come, from a line to thousands of them."""
    import numpy as np
    from transformers import AutoTokenizer

    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "lib2to3" in path.parts:
            continue
        source = path.read_text(encoding="utf8", errors="replace")
        lines = source.splitlines()
        found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
        texts += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in found]
    encode = AutoTokenizer.from_pretrained(model).backend_tokenizer.encode_batch_fast
    made = [len(one) for first in range(0, len(texts), 1024) for one in encode(texts[first : first + 1024], add_special_tokens=False)]
    return np.asarray(made, np.int64)


def waste(model: Path, capacity: int) -> dict[str, Any]:
    """Empty places in packs of real lengths; what is longer than a pack is left out."""
    from mswift.data.packing import PackIndex

    lengths = library_lengths(model)
    lengths = lengths[lengths <= capacity]
    index = PackIndex(lengths, capacity)
    packs = index.of_epoch(0)
    share = index.waste(packs)
    name = f"packs of {len(lengths)} functions and classes, {int(lengths.sum()) / 1e6:.1f} M tokens: empty share"
    return {"name": name, "ours": round(share, 6), "peer": WASTE, "peer_name": "limit", "ratio": round(WASTE / share, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a chat model; its tokenizer and template are used")
    parser.add_argument("--rows", type=int, default=200_000, help="chat rows (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="counted pairs (default: %(default)s)")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that turn rows into tokens (default: %(default)s)")
    parser.add_argument("--lengths", type=int, default=10_000_000, help="rows of the index of packs (default: %(default)s)")
    parser.add_argument("--ms_swift", type=Path, help="a Python interpreter that has ms-swift, to be compared on --ms_swift_rows of the rows")
    parser.add_argument("--ms_swift_rows", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--stream_rows", type=int, default=8000, help="rows that are streamed (default: %(default)s)")
    parser.add_argument("--packing_length", type=int, default=8192, help="tokens of a pack (default: %(default)s)")
    arguments = parser.parse_args()
    rows = tokens(arguments.model, arguments.rows, arguments.pairs, arguments.num_proc, arguments.packing_length) if arguments.rows else []
    rows += index(arguments.lengths, arguments.packing_length) if arguments.lengths else []
    if arguments.lengths:
        rows.append(waste(arguments.model, arguments.packing_length))
    if arguments.stream_rows:
        rows.append(stream(arguments.model, arguments.stream_rows, arguments.pairs))
    if arguments.ms_swift is not None:
        rows.append(ms_swift(arguments.ms_swift, arguments.model, arguments.ms_swift_rows, arguments.pairs, arguments.packing_length))
    else:
        print("ms-swift is not compared: give an interpreter that has it with --ms_swift", file=sys.stderr)
    print(f"{'':72}{'mswift':>12}{'peer':>12}{'ratio':>8}  peer")
    for row in rows:
        print(f"{row['name']:72}{row['ours']:>12}{row['peer']:>12}{row['ratio']:>8}  {row['peer_name']}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
