"""Whether two models are one: every tensor by SHA-256, then the logits of random tokens. Exit code 1 on any difference.

    python converters/verify.py A B
    python converters/verify.py MEGATRON_DIR --against-hf HF_DIR

A and B are Hugging Face directories or Megatron checkpoints. The same as mswift verify --model A --against B.
"""

from __future__ import annotations

import sys

from mswift.cli import program

if __name__ == "__main__":
    flags = iter(["--model", "--against"])
    words = ["--against" if word == "--against-hf" else word for word in sys.argv[1:]]
    given = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    sys.argv[1:] = [part for word in words[:given] for part in (next(flags, "--unexpected"), word)] + words[given:]
    raise SystemExit(program(__doc__ or "", ["verify"]))
