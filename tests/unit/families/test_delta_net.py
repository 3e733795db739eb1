"""Gated delta nets: the chunked rule against the rule itself, what cannot be built, and what a checkpoint may have besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.conversion.rules import Drop
from mswift.errors import LayoutError, ModelError
from mswift.families import find_family
from mswift.families.fields import unknown_fields
from mswift.parallel.layout import ParallelLayout
from tests.distributed.harness import run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.parity.reference import distance
from tests.tiny import config_of, make_model

ROWS = (30, 70, 28, 64, 1, 0, 5, 150, 3)
LENGTHS = (1, 2, 63, 64, 65, 150)
HEADS, KEY_DIM, VALUE_DIM = (2, 3), 5, 7  # two key heads, three value heads on each


def token_by_token(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule as the paper writes it."""
    outputs = []
    for t in range(value.shape[3]):
        state = state * log_decay[..., t, None, None].exp()
        k, q = (part[..., t, :, None].expand(*_of_all_heads(part), -1, 1) for part in (key, query))
        correction = beta[..., t, None, None] * (value[..., t, None, :] - (k * state).sum(-2, keepdim=True))
        state = state + k * correction
        outputs.append((q * state).sum(-2))
    return torch.stack(outputs, dim=3), state


def _of_all_heads(part: Tensor) -> tuple[int, int, int]:
    return part.shape[0], *HEADS


def _inputs(length: int, decay: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = (torch.nn.functional.normalize(draw(HEADS[0], 1, length, KEY_DIM), dim=-1) for _ in range(2))
    state = draw(*HEADS, KEY_DIM, VALUE_DIM)
    return query, key, draw(*HEADS, length, VALUE_DIM), -decay * draw(*HEADS, length).abs(), draw(*HEADS, length).sigmoid(), state


def _rules(rank: int, world: int) -> list[tuple[float, float, float]]:
    from mswift.families.modules.delta_net import delta_rule

    found = []
    for length in LENGTHS:
        for decay in (0.0, 0.5, 90.0):
            inputs = _inputs(length, decay, torch.float64)
            wanted, last = token_by_token(*inputs)
            output, state = delta_rule(*inputs)
            half = length // 2 or 1
            cut = [part[..., :half, :] for part in inputs[:3]], [part[..., :half] for part in inputs[3:5]]
            rest = [part[..., half:, :] for part in inputs[:3]], [part[..., half:] for part in inputs[3:5]]
            first, between = delta_rule(*cut[0], *cut[1], inputs[5])
            second, end = delta_rule(*rest[0], *rest[1], between) if half < length else (first[..., :0, :], between)
            found.append((distance(output, wanted), distance(state, last), max(distance(torch.cat((first, second), 3), wanted), distance(end, last))))
    return found


def test_the_chunked_rule_is_the_rule() -> None:
    """Whole, and cut in two with the state carried over; without decay, with some, and with so much that its inverse would overflow."""
    figures = run_distributed(_rules, 1)[0]
    assert len(figures) == 3 * len(LENGTHS)
    assert max(max(figure) for figure in figures) < 1e-11


def _rows(rank: int, world: int) -> list[float]:
    from mswift.families.modules.delta_net import delta_rule

    inputs = _inputs(sum(ROWS), 0.3, torch.float64)
    weights = torch.linspace(-1, 1, VALUE_DIM, dtype=torch.float64)
    parts = [part.requires_grad_() for part in inputs[:5]]
    begin = torch.zeros_like(inputs[5])
    row_of = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))
    packed, _ = delta_rule(*parts, begin, row_of)
    bounds = [(sum(ROWS[:i]), sum(ROWS[: i + 1])) for i in range(len(ROWS)) if ROWS[i]]
    alone = [delta_rule(*(p[..., a:b, :] for p in parts[:3]), *(p[..., a:b] for p in parts[3:]), begin)[0] for a, b in bounds]
    wanted = torch.cat(alone, dim=3)
    ours, theirs = (torch.autograd.grad((output * weights).sum(), parts) for output in (packed, wanted))
    return [distance(packed, wanted), *(distance(a, b) for a, b in zip(ours, theirs))]


def test_rows_end_to_end_begin_with_an_empty_memory() -> None:
    """Rows that end inside a chunk, at its end, that fill several, of one token and of none."""
    assert max(run_distributed(_rows, 1)[0]) < 1e-12


def _gradients(rank: int, world: int) -> list[bool]:
    from mswift.families.modules.delta_net import delta_rule

    found = []
    for length, decay in ((9, 0.5), (70, 90.0)):
        inputs = [part.requires_grad_() for part in _inputs(length, decay, torch.float64)]
        weights = torch.linspace(-1, 1, VALUE_DIM, dtype=torch.float64)
        ours = torch.autograd.grad((delta_rule(*inputs)[0] * weights).sum(), inputs)
        wanted = torch.autograd.grad((token_by_token(*inputs)[0] * weights).sum(), inputs)
        found += [distance(a, b) < 1e-10 for a, b in zip(ours, wanted)]
    return found


def test_the_gradients_of_the_chunked_rule() -> None:
    assert run_distributed(_gradients, 1)[0] == [True] * 12


def _looking_ahead(rank: int, world: int, run: Run) -> list[float]:
    model = open_model(run, world)
    ids = torch.randint(3, 331, (2, 70), generator=torch.Generator().manual_seed(3))
    changed, short = ids.clone(), ids[:, :40]
    changed[:, 40:] = 0
    whole, other, alone = (model.logits(part) for part in (ids, changed, short))
    assert whole is not None
    assert other is not None
    return [distance(whole[:, :40], other[:, :40]), distance(whole[:, :40], alone), distance(whole[:, 40:], other[:, 40:])]


def test_padding_on_the_right_changes_nothing_before_it(tmp_path: Path) -> None:
    make_model("qwen3_5_text").save_pretrained(tmp_path / "model")
    before, alone, after = run_distributed(_looking_ahead, 1, Run(tmp_path / "model"))[0]
    assert before < 1e-5
    assert alone < 1e-4
    assert after > 0.1


def _checkpoint_keys(rank: int, world: int, run: Run) -> set[str]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = set()
    for entry in open_model(run, world).chunks[0].sharded_state_dict().values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        found |= {part.key for part in parts if isinstance(part, ShardedTensor)}
    return found


def test_checkpoints_have_the_keys_of_megatrons_own_delta_net(tmp_path: Path) -> None:
    """As its module and the layer around it, written over Transformer Engine, name them."""
    make_model("qwen3_5_text", layer_types=["linear_attention"] * 4).save_pretrained(tmp_path / "model")
    prefix = "decoder.layers.0.self_attention."
    found = {key.removeprefix(prefix) for key in run_distributed(_checkpoint_keys, 1, Run(tmp_path / "model"))[0] if key.startswith(prefix)}
    assert found == {
        *(f"in_proj.weight.{block}" for block in ("query", "key", "value", "z", "beta", "alpha")),
        *(f"conv1d.weight.{block}" for block in ("query", "key", "value")),
        *("in_proj.layer_norm_weight", "A_log", "dt_bias", "out_norm.weight", "out_proj.weight"),
    }


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "qwen3_next",
        {"layer_types": ["linear_attention", "sliding_attention", "full_attention", "full_attention"]},
        "layer_types has 'sliding_attention'",
    ),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate is false"),
    ("qwen3_5_text", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16', wanted 'float32'"),
    ("qwen3_5_moe_text", {"num_experts": 4, "mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]"),
]


def _family(kind: str) -> Any:
    return find_family([type(make_model(kind, **options_of(f"{kind}/plain")[1])).__name__], "here")


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_what_cannot_be_exact_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    config = config_of(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=message) as caught:
        _family(kind).describe(config)
    assert "\n" not in str(caught.value)


def test_fields_of_published_configs_are_understood() -> None:
    published = {
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "full_attention_interval": 4,
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
    }
    for kind in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"):
        config = config_of(kind, **options_of(f"{kind}/plain")[1], **published)
        assert unknown_fields({**config.to_dict(), **published}, config, _family(kind).describe) == {}


def test_key_heads_are_not_padded() -> None:
    with pytest.raises(LayoutError, match=r"2 key heads of delta nets by tp\(4\)"):
        ParallelLayout(world=4, tp=4).check_model(num_layers=4, ffn_size=48, key_heads_of_delta_nets=2)
    ParallelLayout(world=2, tp=2).check_model(num_layers=4, ffn_size=48, key_heads_of_delta_nets=2)


def test_layers_for_further_tokens_are_left_out() -> None:
    family = _family("qwen3_next")
    config = config_of("qwen3_next", **options_of("qwen3_next/plain")[1])
    drops = [rule for rule in family.rules(config, family.describe(config).padding(1)) if isinstance(rule, Drop)]
    for name in ("mtp.fc.weight", "mtp.layers.0.mlp.experts.3.up_proj.weight"):
        assert [drop.reason for drop in drops if drop.matches(name)]
    assert not any(drop.matches("model.layers.0.mtp.weight") for drop in drops)
