"""The sides that benchmarks/sft.py and benchmarks/profile_step.py compare: one optimizer step of LoRA fine-tuning at the same shapes.

Each side is a function that builds itself in the process that calls it and returns a step, ``number -> loss``. With RANK and WORLD_SIZE set
it is one of several processes, each with its share of the rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, SEED = 8, 32, 1e-4, 0

Step = Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """What is trained on: `batch` rows of `length` random tokens, a share `labelled` of which are labels. kernels: of our side."""

    model: Path
    dtype: str
    batch: int = 2
    length: int = 512
    labelled: float = 0.4
    kernels: str = "auto"
    tensor_parallel: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def place() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def make_batch(vocab: int, case: Case, part: int = 0, parts: int = 1) -> tuple[Any, Any]:
    """Random tokens ``[b, s + 1]`` and which of them are labels, the same on every side; of `parts` processes the rows of this one."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocab, (case.batch, case.length + 1), generator=generator)
    return ids[part::parts], (torch.rand(case.batch, case.length, generator=generator) < case.labelled)[part::parts]


def ours(case: Case) -> Step:
    """The Megatron engine; several processes are data-parallel, or as `case` says."""
    import torch

    from mswift.data.batches import IGNORED_LABEL, MicroBatch
    from mswift.engines.megatron import MegatronEngine, OptimizerSettings
    from mswift.engines.megatron_model import BuildSettings, MegatronModel
    from mswift.kernels import choice
    from mswift.objectives.sft import SupervisedObjective
    from mswift.parallel.groups import make_groups
    from mswift.parallel.layout import ParallelLayout
    from mswift.runtime.device import init_processes, select
    from mswift.tuners.lora import LoraSettings

    runtime = select("cpu")
    init_processes(runtime)
    layout = ParallelLayout(world=place()[1], tp=case.tensor_parallel)
    built = MegatronModel(BuildSettings(case.model, dtype=case.dtype), make_groups(layout), runtime)
    choice.select(case.kernels)
    built.add_lora(LoraSettings(rank=RANK, alpha=ALPHA, dropout=0.0))
    engine = MegatronEngine(built, OptimizerSettings(learning_rate=LEARNING_RATE, weight_decay=0.0), seed=SEED, source=str(case.model))
    part = engine.groups.coords.dp
    ids, chosen = make_batch(built.description.vocab_size, case, part, layout.dp)
    labels = ids[:, 1:].masked_fill(~chosen, IGNORED_LABEL)
    positions = torch.arange(case.length).expand(len(ids), -1).contiguous()
    micro = MicroBatch(ids[:, :-1].contiguous(), labels, chosen.float(), positions, part, ids[:, 1:].numel(), list(range(len(ids))))
    objective = SupervisedObjective()
    return lambda number: engine.train_step([micro], objective, step=number, learning_rate=LEARNING_RATE).loss


def peer(case: Case) -> Step:
    """transformers (SDPA) and peft."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.utils.logging.set_verbosity_error()
    base = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=getattr(torch, case.dtype), attn_implementation="sdpa")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return hugging_face_step(case, get_peft_model(base, config), base.config.vocab_size)


def hugging_face_step(case: Case, tuned: Any, vocab: int) -> Step:
    """Loss, backward pass, clipping and AdamW; several processes under torch's DistributedDataParallel."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    part, parts = place()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    if parts > 1:
        torch.distributed.init_process_group("gloo")
        tuned = DistributedDataParallel(tuned)
    ids, chosen = make_batch(vocab, case, part, parts)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(~chosen, -100)
    tuned.train()

    def step(_number: int) -> float:
        loss = tuned(input_ids=inputs, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def products(case: Case) -> Step:
    """Nothing but the matrix products that no engine can leave out: forward and input gradient of every frozen linear layer, and of the head
    for the labelled tokens, by torch.mm into buffers that are there already."""
    import torch
    from transformers import AutoConfig

    part, parts = place()
    config = AutoConfig.from_pretrained(case.model)
    _, chosen = make_batch(2, case, part, parts)
    head = config.hidden_size // config.num_attention_heads
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads + 2 * config.num_key_value_heads
    shapes = [(width, heads * head), (config.num_attention_heads * head, width), (width, 2 * inner), (inner, width)]
    work = [(columns, rows, chosen.numel(), config.num_hidden_layers) for columns, rows in shapes]
    block = 4096
    work += [(width, min(block, config.vocab_size - start), int(chosen.sum()), 1) for start in range(0, config.vocab_size, block)]
    buffers = []
    for columns, rows, tokens, times in work:
        weight, x, y = (torch.randn(size).mul_(0.1).to(getattr(torch, case.dtype)) for size in ((rows, columns), (tokens, columns), (tokens, rows)))
        copies = [weight.clone() for _ in range(times)]  # weights come from memory, as in a model
        buffers.append((copies, x, y, torch.empty_like(x)))

    def step(_number: int) -> float:
        for copies, x, y, grad_x in buffers:
            for weight in copies:
                torch.mm(x, weight.t(), out=y)
                torch.mm(y, weight, out=grad_x)
        return 0.0

    return step


SIDES: dict[str, Callable[[Case], Step]] = {"mswift": ours, "transformers+peft": peer, "bare products": products}
