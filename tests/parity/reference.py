"""The other side of the parity tests: what transformers and peft make of the same batches."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mswift.data.batches import IGNORED_LABEL, MicroBatch
from tests.parity.ranks import Measured

VOCABULARY = 331


def random_batches(seed: int = 0) -> list[MicroBatch]:
    """Two micro batches of unequal length, labels at about two places of three, with fractional weights."""
    generator = torch.Generator().manual_seed(seed)
    return [_random_batch(index, shape, generator) for index, shape in enumerate([(2, 22), (2, 14)])]


def _random_batch(index: int, shape: tuple[int, int], generator: torch.Generator) -> MicroBatch:
    ids = torch.randint(3, VOCABULARY, (shape[0], shape[1] + 1), generator=generator)
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.66)
    labels = ids[:, 1:].masked_fill(weights == 0, IGNORED_LABEL)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return MicroBatch(ids[:, :-1].contiguous(), labels, weights, positions, index, ids[:, :-1].numel(), [])


def written_tensors(model: Any) -> dict[str, Tensor]:
    """The model's tensors as a checkpoint has them: transformers 5 holds the experts of a layer in one tensor and writes them one by one."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: tensor.clone() for name, tensor in load_tensors(Path(folder)).items()}


def written_gradients(model: Any) -> dict[str, Tensor]:
    """The gradient of each of them; the weights are lost."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)  # some hold a bias that is not trained
        for buffer in model.buffers():
            buffer.zero_()
    return written_tensors(model)


def measure_reference(model: Any, batches: Sequence[MicroBatch]) -> Measured:
    """Logits of the first micro batch, loss of all, and the norm of its gradients, which stay in the model."""
    total, weight = torch.zeros(()), sum(float(batch.weights.sum()) for batch in batches)
    first: Tensor | None = None
    model.zero_grad()
    for batch in batches:
        logits = model(batch.input_ids, use_cache=False).logits.float()
        log_probs = logits.log_softmax(-1).gather(2, batch.labels.clamp(min=0)[..., None]).squeeze(2)
        total = total - (log_probs * batch.weights).sum() / weight
        first = logits.detach() if first is None else first
    total.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return Measured(first, total.item(), torch.stack(norms).norm().item())


def load_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a directory, read by the safetensors library itself."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def distance(ours: Tensor | None, theirs: Tensor | None) -> float:
    """The largest difference of two tensors of one shape."""
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def last_stage(ranks: Sequence[Measured], tp: int | None = None) -> Tensor:
    """The logits that the ranks of the last stage agree on: bit for bit among `tp` neighbours (None: all), else to the order of their sums."""
    found = [rank.logits for rank in ranks if rank.logits is not None]
    for rank, logits in enumerate(found):
        assert torch.equal(logits, found[rank - rank % (tp or len(found))]), "tensor-parallel ranks have different logits"
        assert distance(logits, found[0]) < 1e-6 * float(found[0].abs().max().clamp(min=1.0))
    return found[0]


def labelled_rows(rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
    """One padded batch for transformers: labels on what an assistant says and its end of turn, found in the text of a ChatML template."""
    ids, labels = [], []
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [match.span(1) for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
        trained = [any(start <= first and last <= end for start, end in spans) for first, last in encoded["offset_mapping"]]
        ids.append(torch.tensor(encoded["input_ids"]))
        labels.append(torch.tensor([token if use else IGNORED_LABEL for token, use in zip(encoded["input_ids"], trained)]))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": pad(ids, batch_first=True), "attention_mask": mask, "labels": pad(labels, batch_first=True, padding_value=IGNORED_LABEL)}


def load_peft(base: Path, adapter: Path, *, trainable: bool = False) -> Any:
    """The base by transformers with the adapter by peft, fp32, without dropout."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable).eval()


@torch.no_grad()
def logits_with(base: Path, adapter: Path | None, ids: Tensor) -> Tensor:
    """Logits of transformers, with the adapter of peft if there is one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager") if adapter is None else load_peft(base, adapter)
    return model(ids, use_cache=False).logits
