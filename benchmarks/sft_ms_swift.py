"""The other side of ``benchmarks/sft.py --ms_swift PYTHON``: ms-swift's loader and tuner, in an interpreter that has it.

Reads the model's directory, a dtype, rows, tokens a row and the share of labels from its arguments. For every number on standard input it does one
step and writes ``answer LOSS``; at the end of its input ``answer MIB``, its peak memory. Around the model is the loop of the other peer, not
ms-swift's trainer, which would only add to it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sides import ALPHA, RANK, Case, hugging_face_step, peak_mib


def main() -> None:
    model, dtype, batch, length, labelled = sys.argv[1:]
    import torch
    from swift.model import get_model_processor
    from swift.tuners import LoraConfig, Swift

    case = Case(Path(model), dtype, int(batch), int(length), float(labelled))
    base, _ = get_model_processor(model, torch_dtype=getattr(torch, dtype), model_type="llama", attn_impl="sdpa", device_map="cpu")
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=layers, task_type="CAUSAL_LM", lora_dtype=dtype)
    step = hugging_face_step(case, Swift.prepare_model(base, config), base.config.vocab_size)
    print("answer ready", flush=True)
    for number in sys.stdin:
        print("answer", step(int(number)), flush=True)
    print("answer", peak_mib(), flush=True)


if __name__ == "__main__":
    main()
