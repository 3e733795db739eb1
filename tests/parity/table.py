"""Writes docs/models.md: every family of the registry with the parity that is measured now. ``python -m tests.parity.table`` (some minutes)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mswift.families import families
from mswift.families.base import ModelFamily
from mswift.log import progress_bar
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run
from tests.distributed.test_parity_parallel import PLAIN, SPECIAL
from tests.parity.cases import CASES, options_of
from tests.parity.ranks import measure
from tests.parity.reference import distance, last_stage, measure_reference, random_batches
from tests.tiny import make_model

TARGET = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Model families

Written by `python -m tests.parity.table`; do not edit by hand.

What is compared: a tiny random model of every variant, unequal dimensions, no tensor left at its initial value, against `transformers` in fp32:
the largest difference of a logit over all variants, and of the loss relative to it. The tests (`tests/parity`, `tests/distributed`) also compare
the gradient of every tensor (1e-4), adapters in `peft`, greedy answers, and the bits of every tensor after Hugging Face -> Megatron -> Hugging Face.

Not supported in any of them: fp16 weights, dropout other than in attention. Rotary types:
default, linear, llama3, yarn, dynamic, longrope (the length of the prompt decides for the whole answer), partial, interleaved, one a layer type.
Layers that predict further ahead (MTP) of deepseek_v3 and glm4_moe can be trained (`--mtp_num_layers`); those of qwen3_next and
qwen3_5 go into exports to Hugging Face's form as they are, not into Megatron checkpoints.
In training, routers of phimoe choose as in evaluation: no jitter, no sampling.

| family | architectures | variants | logits | loss | layouts |
|---|---|---|---|---|---|
"""


def layouts_of(name: str) -> str:
    """The layouts that the parallel parity tests run this family in."""
    mine = [sizes for case, (_, sizes) in [*PLAIN, *SPECIAL] if case.startswith(f"{name}/")]
    found = ["x".join(f"{axis}{size}" for axis, size in sizes.items() if size is not True) for sizes in mine]
    sequence = any("sequence_parallel" in sizes for sizes in mine)
    return ", ".join([*dict.fromkeys(found), *(["sp"] if sequence else [])])


def row_of(family: ModelFamily) -> str:
    """One line of the table; builds and runs every variant."""
    logits, loss, batches = 0.0, 0.0, random_batches()
    for variant in CASES[family.name]:
        _, changes = options_of(f"{family.name}/{variant}")
        model = make_model(family.name, **changes)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/model")
            ranks = run_distributed(measure, 1, Run(Path(folder) / "model", max_grad_norm=0.0), batches, Path(folder) / "gradients")
        expected = measure_reference(model, batches)
        logits = max(logits, distance(last_stage(ranks), expected.logits))
        loss = max(loss, abs(ranks[0].loss / expected.loss - 1.0))
    architectures = ", ".join(f"`{name}`" for name in family.architectures)
    return f"| {family.name} | {architectures} | {', '.join(CASES[family.name])} | {logits:.1e} | {loss:.1e} | tp1, {layouts_of(family.name)} |\n"


if __name__ == "__main__":
    with progress_bar("measuring") as progress:
        rows = []
        for done, family in enumerate(families()):
            progress(done, len(families()))
            rows.append(row_of(family))
    TARGET.write_text(HEAD + "".join(rows), encoding="utf8")
