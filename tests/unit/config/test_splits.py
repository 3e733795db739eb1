"""Layers of pipeline stages: the layout string is read as megatron-core reads it, every other split counts as megatron-core counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.config import SftConfig
from mswift.config.splits import PipelineSplit, parse_stages
from mswift.errors import ConfigError, LayoutError
from mswift.parallel.layout import ParallelLayout

STRINGS = ["EttL", "Et|tL", "E|t*4|L", "Ett,|(tt|)*3,tL", "Et*3|(t|t)*2tmL", "E(t|)*12L", "EtttmmL"]


@pytest.mark.parametrize("text", STRINGS)
def test_a_string_is_read_as_megatron_reads_it(text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    names = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    theirs = tuple("".join(names[layer.name] for layer in stage) for stage in PipelineParallelLayerLayout.parse_str_to_list(text))
    assert parse_stages(text) == theirs
    assert "".join(theirs).count("E") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Etx|tL", "got 'Etx|tL' with 'x', wanted E, t, m, L and |"),
        ("E t|tL", "with ' '"),
        ("tE|tL", "wanted one E (the embedding) first"),
        ("Ett|t", "one L (the loss) last"),
        ("EEt|tL", "wanted one E"),
        ("Et|mtL", "then layers t, then layers m"),
        ("Et|tm|L", "wanted every m in the last stage"),
        ("Et*1000000|tL", "a repetition of at most 100000"),
        ("E(tt|)*99999L", "a repetition of at most 100000"),
        ("", "wanted one E"),
    ],
)
def test_a_string_that_is_none_is_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_stages(text)
    assert words in str(caught.value)
    assert str(caught.value).startswith("--pipeline_model_parallel_layout: got ")
    assert "\n" not in str(caught.value)


@given(
    pp=st.integers(2, 5),
    vpp=st.integers(1, 3),
    layers=st.integers(1, 40),
    first=st.none() | st.integers(1, 9),
    last=st.none() | st.integers(1, 9),
    counted=st.tuples(st.booleans(), st.booleans()),
)
def test_counts_are_megatrons(pp: int, vpp: int, layers: int, first: int | None, last: int | None, counted: tuple[bool, bool]) -> None:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    uneven = first is not None or last is not None
    split = PipelineSplit(first, last) if uneven else PipelineSplit(None, None, *counted)
    if list(split.faults(layers, pp, vpp)):
        return
    ends = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    embedding, loss = (False, False) if uneven else counted
    ends |= {"account_for_embedding_in_pipeline_split": embedding, "account_for_loss_in_pipeline_split": loss}
    sizes = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None}
    import torch

    config = TransformerConfig(num_layers=layers, hidden_size=8, num_attention_heads=2, pipeline_dtype=torch.float32, **sizes, **ends)
    places = [(stage if vpp > 1 else None, rank) for stage in range(vpp) for rank in range(pp)]
    counts = split.counts(layers, pp, vpp)
    assert list(counts) == [get_num_layers_to_build(config, *place) for place in places]
    if not (pp == 2 and vpp > 1 and first and last):  # where megatron-core 0.16.1 divides by zero
        assert [sum(counts[:index]) for index in range(pp * vpp)] == [get_transformer_layer_offset(config, *place) for place in places]
    assert sum(counts) == layers


FAULTS = [
    ({"pp": 2, "split": PipelineSplit(first=3)}, 3, "3 layers - first(3) = 0 by 1 other stage(s) of pp(2) x vpp(1) = 1"),
    ({"pp": 2, "split": PipelineSplit(first=3)}, 2, "2 layers - first(3) = -1 by 1 other stage(s)"),
    ({"pp": 2, "split": PipelineSplit(1, 2)}, 4, "4 layers - first(1) - last(2) = 1 by 0 other stage(s) of pp(2) x vpp(1) = 0"),
    ({"pp": 4, "split": PipelineSplit(1, 2)}, 8, "8 layers - first(1) - last(2) = 5 by 2 other stage(s) of pp(4) x vpp(1) = 2"),
    ({"pp": 2, "vpp": 2, "split": PipelineSplit(first=3)}, 7, "first(3) layers by vpp(2)"),
    ({"pp": 2, "split": PipelineSplit(count_loss=True)}, 4, "4 layers and the loss by pp(2) x vpp(1) = 2"),
    ({"pp": 2, "split": PipelineSplit(text="Ett|tL")}, 4, "4 layers by the 3 t of --pipeline_model_parallel_layout Ett|tL"),
    ({"pp": 2, "split": PipelineSplit(text="Ett|ttmL")}, 4, "0 mtp_num_layers by the 1 m of --pipeline_model_parallel_layout Ett|ttmL"),
]


@pytest.mark.parametrize(("sizes", "layers", "words"), FAULTS)
def test_a_split_that_does_not_fit_is_told_with_every_factor(sizes: dict, layers: int, words: str) -> None:
    layout = ParallelLayout.smallest(**sizes)
    with pytest.raises(LayoutError) as caught:
        layout.check_model(num_layers=layers, ffn_size=48)
    assert words in str(caught.value)
    assert layout.describe() in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splits_that_fit() -> None:
    layout = ParallelLayout.smallest(pp=3, split=PipelineSplit(1, 3))
    layout.check_model(num_layers=6, ffn_size=48)
    assert layout.layers_of_stages(6) == (1, 2, 3)
    assert ParallelLayout.smallest(pp=2, vpp=2, split=PipelineSplit(first=2)).layers_of_stages(8) == (1, 3, 1, 3)
    assert ParallelLayout.smallest(pp=2, split=PipelineSplit(count_embedding=True, count_loss=True)).layers_of_stages(4) == (2, 2)
    assert ParallelLayout(world=2, pp=2, split=PipelineSplit(first=3)).describe() == "tp1 pp2 (first 3) dp1 (2 processes)"


def test_a_string_brings_its_virtual_stages() -> None:
    text = "Et|t|tt|tL"
    config = SftConfig.from_flat({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": text})
    layout = ParallelLayout(world=2, **config.parallel.sizes())
    assert (layout.pp, layout.vpp, layout.layers_of_stages(5)) == (2, 2, (1, 1, 2, 1))
    with pytest.raises(LayoutError, match=r"4 stage\(s\) in Et\|t\|tt\|tL by pp\(3\) x vpp\(1\) = 3"):
        ParallelLayout(world=3, pp=3, split=PipelineSplit(text=text))
