"""Our modules for megatron's specs against plain formulas in fp64, and what cannot be built is refused. All in one rank."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import RankError, run_distributed
from tests.distributed.runs import Run, open_model
from tests.tiny import make_model


def _config(**fields: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    sizes = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4, "kv_channels": 10, "use_cpu_initialization": True}
    return TransformerConfig(**{**sizes, **fields})


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, chunk: int | None, padding: list[int], hidden: Tensor | None, scale: float
) -> Tensor:
    """Scores, mask and softmax written out; ``[sq, b, heads, dim]`` -> ``[sq, b, heads * dim]``."""
    sq, batch, heads, _ = query.shape
    sk, _, groups, _ = key.shape
    key, value = (part.repeat_interleave(heads // groups, dim=2) for part in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    for i in range(sq):
        for j in range(sk):
            distance = i + sk - sq - j
            if distance < 0 or (window is not None and distance >= window):
                scores[:, :, i, j] = -torch.inf
            for row, first in enumerate(padding):
                if chunk is not None and (i + sk - sq - first) // chunk != (j - first) // chunk:
                    scores[row, :, i, j] = -torch.inf
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value).reshape(sq, batch, -1)


WINDOWS = {None: {}, 4: {"window_size": (3, 0)}}
SHAPES = [(9, 9), (1, 9), (4, 9), (1, 1), (3, 3)]


def _attention(rank: int, world: int) -> list[float]:
    from mswift.families.modules import SdpaAttention

    generator, found = torch.Generator().manual_seed(0), []
    for window, chunk, scale in itertools.product(WINDOWS, (None, 3), (None, 0.7)):
        own: dict[str, Any] = {"softmax_scale": scale, "chunk_of_layer": None if chunk is None else (chunk, None)}
        attention = SdpaAttention(_config(num_query_groups=2, **WINDOWS[window]), 1, None, "self", **own).eval()
        for sq, sk in SHAPES:
            query, key, value = (torch.randn(*shape, 10, generator=generator, dtype=torch.float64) for shape in ((sq, 3, 4), (sk, 3, 2), (sk, 3, 2)))
            for padding in (None, torch.tensor([0, 2, 0])):
                hidden = None
                if padding is not None:
                    places = torch.arange(sk)
                    hidden = (places < padding[:, None])[:, None, None, :] & (places[sk - sq :, None] != places)
                columns = [0, min(2, sk - 1), 0] if padding is not None else [0] * 3
                expected = plain_attention(query, key, value, window, chunk, columns, hidden, scale or 10**-0.5)
                found.append(float((attention(query, key, value, hidden) - expected).abs().max()))
    return found


def test_core_attention() -> None:
    """Causal, in windows and chunks, with the last query at the last key, with padding on the left, with a scale of its own."""
    errors = run_distributed(_attention, 1)[0]
    assert len(errors) == len(WINDOWS) * 2 * 2 * len(SHAPES) * 2
    assert max(errors) < 1e-12


def _windows(rank: int, world: int) -> list[Any]:
    from mswift.families.modules.attention import _window_of_layer

    every = _config()
    some = _config(window_size=(7, 0), window_attn_skip_freq=[1, 0, 0, 1])
    second = _config(window_size=(7, 0), window_attn_skip_freq=2)
    always = _config(window_size=(0, 0))
    return [[_window_of_layer(config, layer) for layer in range(1, 5)] for config in (every, some, second, always)]


def test_which_layer_has_a_window() -> None:
    every, some, second, always = run_distributed(_windows, 1)[0]
    assert every == [None] * 4
    assert some == [8, None, None, 8]
    assert second == [8, None, 8, None]
    assert always == [1, 1, 1, 1]


STYLES = [("rms", False), ("rms", True), ("layer", False), ("layer", True)]


def _norms(rank: int, world: int) -> list[tuple[Tensor, ...]]:
    from mswift.families.base import NormStyle
    from mswift.families.modules import Norm

    generator, found = torch.Generator().manual_seed(1), []
    for kind, zero_centred in STYLES:
        style = NormStyle(kind, zero_centred, bias=kind == "layer")  # type: ignore[arg-type]
        norm = Norm(_config(params_dtype=torch.bfloat16, bf16=True, sequence_parallel=False), 24, eps=1e-3, style=style)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.rand(24, generator=generator) + 0.5)
        x = (torch.randn(7, 3, 24, generator=generator) * 3).bfloat16()
        bias = torch.zeros(24) if norm.bias is None else norm.bias.detach()
        found.append((x, norm.weight.detach(), bias, norm(x).detach()))
    return found


def test_norms_are_rounded_once() -> None:
    for (kind, zero_centred), (x, weight, bias, found) in zip(STYLES, run_distributed(_norms, 1)[0], strict=True):
        wide = x.double() if kind == "rms" else x.double() - x.double().mean(-1, keepdim=True)
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight.double() + zero_centred) + bias.double()
        assert found.dtype == weight.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, atol=2**-9, rtol=2**-8)
        assert (found == exact.bfloat16()).double().mean() > 0.97


def _build(rank: int, world: int, run: Run) -> str:
    model = open_model(run, world)
    return model.padded_heads


def test_models_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(RankError, match="LayoutError"):
        run_distributed(_build, 3, Run(tmp_path / "model", pp=3))
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("LlamaForCausalLM", "LlamaForCausalLN"))
    with pytest.raises(RankError, match=r"ModelError: .*architecture LlamaForCausalLN is not supported; nearest supported: LlamaForCausalLM"):
        run_distributed(_build, 1, Run(tmp_path / "model"))
    config.write_text(text[:-10])
    with pytest.raises(RankError, match=r"ModelError: .*config\.json"):
        run_distributed(_build, 1, Run(tmp_path / "model"))
    config.write_text(text.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    with pytest.raises(RankError, match=r"ConversionError: .*model\.layers\.4"):
        run_distributed(_build, 1, Run(tmp_path / "model"))


def test_padded_heads_are_said(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    assert run_distributed(_build, 1, Run(tmp_path / "model")) == [""]
    text = "6 attention heads padded to 8 for tp2; zeros, exact, cut off on export"
    assert run_distributed(_build, 2, Run(tmp_path / "model", tp=2)) == [text, text]
