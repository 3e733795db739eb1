"""A LoRA adapter from PEFT's form to Megatron's, and back.

    python converters/adapter.py --model BASE --adapters PEFT_DIR --output OUT
    python converters/adapter.py --model BASE --mcore_adapter MEGATRON_DIR --output OUT

The same as mswift export with --to_mcore true or --to_peft_format true.
"""

from __future__ import annotations

import sys

from mswift.cli import program

if __name__ == "__main__":
    back = any(word.split("=")[0] in ("--mcore_adapter", "--mcore-adapter") for word in sys.argv[1:])
    raise SystemExit(program(__doc__ or "", ["export", "--to_peft_format" if back else "--to_mcore", "true"]))
