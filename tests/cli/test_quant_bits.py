"""``mswift sft --quant_bits``: what is said, what is written, and what a resumed run has to agree on."""

from __future__ import annotations

from tests.cli.conftest import Lab
from tests.cli.program import Worker, contents

QUANT = ["--quant_method", "bnb", "--quant_bits", "4"]


def test_a_run_its_exports_and_its_resume(lab: Lab, heavy: Worker) -> None:
    outcome = heavy.run(lab.sft(*QUANT, "--merge_lora", "true"), lab.folder)
    assert outcome.code == 0, outcome.err
    assert "model: 16 linear layers in nf4: 0.1 MiB in place of 0.6 on each process" in outcome.err
    assert {"adapter_model.safetensors", "adapter_config.json"} <= contents(lab.folder / "out" / "checkpoint-4").keys()
    merged = contents(lab.folder / "out" / "merged")
    outcome = heavy.run(lab.export(adapter="out/checkpoint-4"), lab.folder)
    assert outcome.code == 0, outcome.err
    assert contents(lab.folder / "exported")["model.safetensors"] == merged["model.safetensors"], "merged into the checkpoint's own weights"
    other = lab.sft("--quant_method", "bnb", "--quant_bits", "8", "--resume_from_checkpoint", "auto", "--max_steps", "6")
    outcome = heavy.run(other, lab.folder)
    assert outcome.code != 0
    assert "was made with --quant_bits 4, got 8; give the same" in outcome.err
    outcome = heavy.run(lab.sft(*QUANT, "--bnb_4bit_compute_dtype", "bfloat16", output="new"), lab.folder)
    assert outcome.code != 0
    assert "--bnb_4bit_compute_dtype bfloat16 differs from --torch_dtype float32" in outcome.err
