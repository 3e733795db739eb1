"""The other side of ``benchmarks/data.py --ms_swift PYTHON``: ms-swift's template and packing on the same rows, in an interpreter that has it.

Reads the model's directory, a file of rows, the system prompt, the length of a pack and a number of processes from its arguments. For every line on
standard input it turns all rows into tokens and packs, and writes a line of JSON: seconds, tokens, packs.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    model, rows, system, capacity, num_proc = sys.argv[1:]
    from datasets import Dataset  # type: ignore[import-untyped]
    from swift.dataset import EncodePreprocessor
    from swift.dataset.packing import PackingDataset, calculate_matched_group
    from swift.model import get_processor
    from swift.template import get_template

    template = get_template(get_processor(model, model_type="llama"), template_type="chatml", default_system=system, max_length=int(capacity))
    template.set_mode("train")
    with open(rows, encoding="utf8") as file:
        data = Dataset.from_list([json.loads(line) for line in file])
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        made = EncodePreprocessor(template=template)(data, num_proc=int(num_proc), load_from_cache_file=False)
        lengths, packs = list(enumerate(made["length"])), 0
        left: list[tuple[int, int]] = []
        for start in range(0, len(lengths), PackingDataset.PACKING_BATCH_SIZE):
            end = start + PackingDataset.PACKING_BATCH_SIZE
            full, left = calculate_matched_group(left + lengths[start:end], int(capacity), is_finished=end >= len(lengths))
            packs += len(full)
        seconds = time.perf_counter() - begun
        print(json.dumps([seconds, sum(length for _, length in lengths), packs]), flush=True)


if __name__ == "__main__":
    main()
