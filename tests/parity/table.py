"""Writes docs/models.md: every family of the registry with the parity that is measured now. ``python -m tests.parity.table`` (some minutes).

``python -m tests.parity.table --keep``: everything anew but the figures, which stay as they are.
"""

from __future__ import annotations

import sys
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

Not supported in any of them: fp16 weights, dropout other than in attention, other activations than the family's own, one expert a token whose weight
is made 1, DoRA on experts, their gates and routers, rows end to end over context-parallel ranks. Rotary types:
default, linear, llama3, yarn, dynamic, longrope (the length of the prompt decides for the whole answer), partial, interleaved, one a layer type.
Layers that predict further ahead (MTP) of deepseek_v3, glm4_moe, qwen3_next and qwen3_5 are converted, and trained with `--mtp_num_layers`.
Routed experts may be written one by one or all of a layer in two tensors, and come back so. Of the checkpoints of larger models (`Qwen3_5...` and
`Llama4ForConditionalGeneration`) the text part is trained; an export from the Hugging Face form has the vision tower as it was, a Megatron
checkpoint is the text model alone.
The last column has what a family lacks besides: where it is a field of config.json, a model that has it is refused.

| family | architectures | variants | logits | loss | layouts | not supported |
|---|---|---|---|---|---|---|
"""


def layouts_of(name: str) -> str:
    """The layouts that the parallel parity tests run this family in."""
    mine = [sizes for case, (_, sizes) in [*PLAIN, *SPECIAL] if case.startswith(f"{name}/")]
    found = ["x".join(f"{axis}{size}" for axis, size in sizes.items() if size is not True) for sizes in mine]
    sequence = any("sequence_parallel" in sizes for sizes in mine)
    return ", ".join([*dict.fromkeys(found), *(["sp"] if sequence else [])])


def measured(family: ModelFamily) -> tuple[str, str]:
    """The two figures of a family; builds and runs every variant."""
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
    return f"{logits:.1e}", f"{loss:.1e}"


def kept(family: ModelFamily) -> tuple[str, str]:
    """Those that the page has."""
    line = next(line for line in TARGET.read_text(encoding="utf8").splitlines() if line.startswith(f"| {family.name} |"))
    logits, loss = line.split(" | ")[3:5]
    return logits, loss


def row_of(family: ModelFamily, figures: tuple[str, str]) -> str:
    """One line of the table."""
    architectures = ", ".join(f"`{name}`" for name in (*family.architectures, *family.holders))
    layouts = f"tp1, {layouts_of(family.name)}"
    return f"| {' | '.join([family.name, architectures, ', '.join(CASES[family.name]), *figures, layouts, family.limits or '-'])} |\n"


if __name__ == "__main__":
    with progress_bar("measuring") as progress:
        rows = []
        for done, family in enumerate(families()):
            progress(done, len(families()))
            rows.append(row_of(family, kept(family) if "--keep" in sys.argv else measured(family)))
    TARGET.write_text(HEAD + "".join(rows), encoding="utf8")
