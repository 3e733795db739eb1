"""What a wrong bridge looks like: each small mistake in a description, a rule or a module must show in the parity tests, or they prove nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.conversion.rules import AnyRule, FusedGateUp, FusedQKV, GatedSlab, GroupedBlocks, Piece, Slab
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.parity.reference import distance, measure_reference, random_batches
from tests.tiny import make_model

Change = Callable[[Any], Any]


def swap_gate_and_up(rule: AnyRule) -> AnyRule:
    return replace(rule, gate=rule.up, up=rule.gate) if isinstance(rule, FusedGateUp) else rule


def another_order(rule: AnyRule) -> AnyRule:
    return replace(rule, index=(rule.index + 1) % rule.count) if isinstance(rule, Slab) else rule


def swap_keys_and_values(rule: AnyRule) -> AnyRule:
    return replace(rule, k=rule.v, v=rule.k) if isinstance(rule, FusedQKV) else rule


class GatesForQueries(FusedQKV):
    """Takes the rows of a head's gate for those of its query, and the other way round."""

    def pieces(self, source_shapes: Mapping[str, Any]) -> tuple[Piece, ...]:
        size = self.head_dim
        moved = [(piece, 1 if piece.start // size % 2 == 0 else -1) for piece in super().pieces(source_shapes)]
        return tuple(replace(p, start=p.start + by * size, stop=p.stop + by * size) if p.source == self.q else p for p, by in moved)


def swap_queries_and_gates(rule: AnyRule) -> AnyRule:
    return GatesForQueries(**{field.name: getattr(rule, field.name) for field in fields(rule) if field.init}) if isinstance(rule, FusedQKV) else rule


def swap_beta_and_alpha(rule: AnyRule) -> AnyRule:
    if not isinstance(rule, GroupedBlocks) or len(rule.tensors) != 4:
        return rule
    return replace(rule, tensors=(*rule.tensors[:2], *rule.tensors[:1:-1]))


def without_groups(rule: AnyRule) -> AnyRule:
    if not isinstance(rule, GroupedBlocks):
        return rule
    return replace(rule, tensors=tuple((name, tuple(rows * rule.groups for rows in blocks)) for name, blocks in rule.tensors), groups=1)


def filter_one_token_late() -> None:
    from torch.nn import functional

    from mswift.families.modules.delta_net import CausalConvolution

    right = CausalConvolution.forward
    CausalConvolution.forward = lambda self, x, before: right(self, functional.pad(x, (1, -1)), before)  # type: ignore[method-assign]


def centre_the_norm_of_delta_nets_at_zero() -> None:
    from mswift.families.modules.delta_net import GatedNorm

    right = GatedNorm.forward
    GatedNorm.forward = lambda self, x, gate: right(self, x, gate) + right(self, x, gate) / self.weight  # type: ignore[method-assign]


def keep_the_length_of_keys() -> None:
    from mswift.families.modules import delta_net

    delta_net._unit = lambda x: x


def attention(**changes: Any) -> Change:
    return lambda description: replace(description, attention=replace(description.attention, **changes))


def choice(**changes: Any) -> Change:
    return lambda description: replace(description, choice=replace(description.choice, **changes))


def wider_window(description: Any) -> Any:
    width, _ = description.transformer["window_size"]
    return replace(description, transformer={**description.transformer, "window_size": (width + 1, 0)})


def centred_at_one(description: Any) -> Any:
    return replace(description, norm=replace(description.norm, zero_centred=False))


def another_scale(description: Any) -> Any:
    return replace(description, transformer={**description.transformer, "softmax_scale": None})


def narrower_window(description: Any) -> Any:
    width, _ = description.transformer["window_size"]
    return replace(description, transformer={**description.transformer, "window_size": (width - 1, 0)})


def flipped_pre_softmax(description: Any) -> Any:
    pre = description.transformer["moe_router_pre_softmax"]
    return replace(description, transformer={**description.transformer, "moe_router_pre_softmax": not pre})


def transformer(**changes: Any) -> Change:
    return lambda description: replace(description, transformer={**description.transformer, **changes})


def router(**changes: Any) -> Change:
    return lambda description: replace(description, router=replace(description.router, **changes))


def weighed_output(description: Any) -> Any:
    return replace(description, transformer={**description.transformer, "moe_apply_probs_on_input": False})


DESCRIPTIONS: dict[str, tuple[str, Change]] = {
    "a window of one token more": ("mistral/windows", wider_window),
    "a norm without its one": ("gemma/plain", centred_at_one),
    "a head norm without its one": ("gemma3_text/plain", lambda d: attention(norm=replace(d.attention.norm, zero_centred=False))(d)),
    "halves in place of pairs": ("glm4/plain", attention(interleaved=False)),
    "pairs in place of halves": ("llama/plain", attention(interleaved=True)),
    "a layer without rotation": ("qwen3/plain", lambda d: attention(rotation_of_layer=(0, 0, 0, None))(d)),
    "no cap on the scores": ("gemma2/plain", attention(softcap=None)),
    "no cap on the logits": ("gemma2/plain", lambda d: replace(d, logit_softcap=None)),
    "the usual scale of the scores": ("granite/plain", another_scale),
    "no factor on the sublayers": ("granite/plain", lambda d: replace(d, residual_scale=0.5)),
    "no factor on the embedding": ("gemma/plain", lambda d: replace(d, embedding_scale=1.0)),
    "no factor on the logits": ("cohere/plain", lambda d: replace(d, logit_scale=1.0)),
    "a rotation everywhere": ("smollm3/plain", attention(rotation_of_layer=(0, 0, 0, 0))),
    "the wrong rotation": ("gemma3_text/scaled", lambda d: attention(rotations=d.attention.rotations[::-1])(d)),
    "a norm around delta nets without its one": ("qwen3_5_text/plain", centred_at_one),
    "a head norm of gated attention without its one": (
        "qwen3_next/dense-biases",
        lambda d: attention(norm=replace(d.attention.norm, zero_centred=False))(d),
    ),
    "halves in place of pairs in latent attention": ("deepseek_v3/plain", attention(interleaved=False)),
    "pairs in place of halves in latent attention": ("deepseek_v3/halves-biases", attention(interleaved=True)),
    "a scale of the scores that does not grow with the rotation": ("deepseek_v3/plain", another_scale),
    "the config's epsilon in narrow norms": (
        "deepseek_v3/plain",
        lambda d: attention(latent=replace(d.attention.latent, epsilon=d.transformer["layernorm_epsilon"]))(d),
    ),
    "a group judged by its best expert": ("deepseek_v3/plain", choice(judged_by=1)),
    "a group judged by its two best experts": ("deepseek_v2/plain", choice(judged_by=2)),
    "weights of experts normalised": ("deepseek_v3/not-normalised", choice(normalised=True)),
    "experts chosen from all groups": ("deepseek_v3/plain", choice(groups=1)),
    "a window of one token less": ("gpt_oss/plain", narrower_window),
    "a softmax over all experts": ("gpt_oss/plain", flipped_pre_softmax),
    "a gate without its limit": ("gpt_oss/plain", transformer(activation_func_clamp_value=None)),
    "a gate without its one": ("gpt_oss/plain", transformer(glu_linear_offset=0.0)),
    "a usual softmax in a corrected router": ("ernie4_5_moe/plain", router(floor=1.0)),
    "scores of a mixture by the usual scale": ("granitemoe/plain", another_scale),
    "two experts by a plain softmax": ("phimoe/near", router(jitter=1e9)),
    "chunks of one token more": (
        "llama4_text/plain",
        lambda d: attention(chunk_of_layer=tuple(chunk and chunk + 1 for chunk in d.attention.chunk_of_layer))(d),
    ),
    "windows in place of chunks": (
        "llama4_text/plain",
        lambda d: attention(chunk_of_layer=None)(
            replace(d, transformer={**d.transformer, "window_size": (5, 0), "window_attn_skip_freq": [1, 1, 0, 1]})
        ),
    ),
    "growth of the queries in rotated layers too": ("llama4_text/plain", attention(factor_of_layer=None)),
    "no norm behind the rotation": ("llama4_text/plain", attention(head_norm=None)),
    "the output of an expert weighed, not its input": ("llama4_text/plain", weighed_output),
    "no growth of the queries": ("ministral3/plain", attention(query_factor=None)),
}


def unwoven(rule: AnyRule) -> AnyRule:
    return replace(rule, woven=False) if isinstance(rule, GatedSlab) else rule


def next_expert(rule: AnyRule) -> AnyRule:
    """Expert 1 of one layer reads expert 2, and the other way round."""
    swapped = isinstance(rule, Slab) and rule.target.startswith("decoder.layers.1.") and rule.index in (1, 2)
    return replace(rule, index=3 - rule.index) if swapped else rule


RULES: dict[str, tuple[str, Change]] = {
    "experts in another order": ("llama4_text/plain", another_order),
    "gate and up swapped": ("llama/plain", swap_gate_and_up),
    "keys and values swapped": ("qwen3/plain", swap_keys_and_values),
    "gates taken for queries": ("qwen3_5_text/plain", swap_queries_and_gates),
    "beta and alpha swapped": ("qwen3_5_text/plain", swap_beta_and_alpha),
    "blocks that are not by key head": ("qwen3_next/dense-biases", without_groups),
    "gate and up not in turn": ("gpt_oss/plain", unwoven),
    "two experts swapped": ("granitemoe/plain", next_expert),
}
CODE: dict[str, tuple[str, Callable[[], None]]] = {
    "a filter that sees one token too late": ("qwen3_5_text/plain", filter_one_token_late),
    "the norm of a delta net around zero": ("qwen3_5_text/plain", centre_the_norm_of_delta_nets_at_zero),
    "queries and keys of any length": ("qwen3_5_text/plain", keep_the_length_of_keys),
}
TENSORS: dict[str, tuple[str, str]] = {
    "no sinks": ("gpt_oss/plain", r"core_attention\.softmax_offset"),
    "one expert without its first bias": ("gpt_oss/plain", r"layers\.1\.mlp\.experts\.local_experts\.2\.linear_fc1\.bias"),
    "one expert without its second bias": ("gpt_oss/plain", r"layers\.1\.mlp\.experts\.local_experts\.2\.linear_fc2\.bias"),
    "no bias on the router": ("gpt_oss/plain", r"router\.bias"),
    "no bias for the choice": ("ernie4_5_moe/plain", r"router\.expert_bias"),
    "no bias on the head": ("phimoe/plain", r"output_layer\.bias"),
}
"""Parameters, by a part of their name, that are set to zero, or to nothing where they are sinks."""


def emptied(model: Any, pattern: str) -> Any:
    """The model without some of its parameters."""
    found = [
        (name, tensor) for chunk in model.chunks for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()) if re.search(pattern, name)
    ]
    assert found
    for name, tensor in found:
        tensor.data.fill_(-torch.inf if name.endswith("softmax_offset") else 0.0)
    return model


def right_and_wrong(rank: int, world: int, run: Run, name: str) -> tuple[Tensor, Tensor]:
    """Logits of a model as it is, and built or filled with one mistake."""
    from mswift.families import base
    from mswift.families.model import read_hf_config

    ids = random_batches()[0].input_ids
    right = open_model(run, world).logits(ids)
    family = base.find_family(read_hf_config(run.checkpoint).architectures, "here")
    if name in TENSORS:
        wrong = emptied(open_model(run, world), TENSORS[name][1]).logits(ids)
        assert right is not None
        assert wrong is not None
        return right, wrong
    if name in DESCRIPTIONS:
        change = DESCRIPTIONS[name][1]
        base.register(replace(family, describe=lambda hf: change(family.describe(hf))))
    elif name in CODE:
        CODE[name][1]()
    else:
        change = RULES[name][1]
        base.register(replace(family, rules=lambda hf, padding: tuple(change(rule) for rule in family.rules(hf, padding))))
    wrong = open_model(run, world).logits(ids)
    assert right is not None
    assert wrong is not None
    return right, wrong


@pytest.mark.parametrize("name", [*DESCRIPTIONS, *RULES, *CODE, *TENSORS])
def test_a_mistake_shows(name: str, tmp_path: Path) -> None:
    family, changes = options_of({**DESCRIPTIONS, **RULES, **CODE, **TENSORS}[name][0])
    model = make_model(family, **changes)
    model.save_pretrained(tmp_path / "model")
    expected = measure_reference(model, random_batches()).logits
    ((right, wrong),) = run_distributed(right_and_wrong, 1, Run(tmp_path / "model"), name)
    assert distance(right, expected) < 1e-4
    assert distance(wrong, expected) > 1e-3
