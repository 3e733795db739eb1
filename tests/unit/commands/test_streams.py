"""How ``--streaming true`` opens its stream: what the flags of a batch say reaches it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mswift.commands.session import Session
from mswift.commands.streams import open_stream
from mswift.commands.training_data import read_settings
from mswift.config import parse_command
from mswift.parallel.groups import Groups, make_groups
from mswift.parallel.layout import ParallelLayout
from mswift.runtime.device import select
from mswift.templates import ChatTemplate
from tests.unit.templates.registry import assistant, tokenizer_for, user

FLAGS = ["--model", "m", "--streaming", "true", "--micro_batch_size", "4", "--global_batch_size", "4"]


@pytest.fixture
def groups(world_of_one: None) -> Groups:
    return make_groups(ParallelLayout(world=1))


def test_rows_of_a_stream_lie_end_to_end_where_that_is_asked_for(groups: Groups, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": [user("x" * i), assistant("y")]}) + "\n" for i in (1, 9, 5, 3)))
    template, session = ChatTemplate(tokenizer_for("chatml")), Session(tmp_path, select("cpu"), groups)
    steps = []
    for flags in ([], ["--padding_free", "true"]):
        config = parse_command("sft", ["--dataset", str(path), *FLAGS, *flags])
        (batch,) = open_stream(config, session, template, read_settings(config), limit=None).step(0)
        steps.append(batch)
    padded, whole = steps
    assert padded.cu_seqlens is None
    assert whole.cu_seqlens is not None
    lengths = whole.cu_seqlens.diff()
    assert whole.input_ids.shape == (1, int(lengths.sum())) == (1, padded.num_tokens)
    assert padded.input_ids.shape == (4, int(lengths.max()))
    for row, (begin, end) in enumerate(zip(whole.cu_seqlens[:-1].tolist(), whole.cu_seqlens[1:].tolist(), strict=True)):
        for name in ("input_ids", "labels", "weights", "position_ids"):
            assert torch.equal(getattr(whole, name)[0, begin:end], getattr(padded, name)[row, : end - begin]), name
