"""Megatron checkpoints: written in one layout, read in another, bit for bit; read by megatron-core's own model; gone on with after a kill."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mswift.conversion.peft_io import read_peft
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.errors import CheckpointError, ConversionError
from tests.distributed.harness import RankError, run_distributed
from tests.distributed.runs import Run, open_model
from tests.parity.cases import options_of
from tests.tiny import make_checkpoint, make_model, make_peft_adapter

CASES = ("llama/plain", "llama/tied", "qwen3_next/plain", "olmo2/one-group", "phi3/plain", "starcoder2/plain", "qwen3_moe/plain", "glm4_moe/plain")
SP2 = {"tp": 2, "sequence_parallel": True}
MIXED_LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [(SP2, {"pp": 2}), ({"pp": 2}, SP2)]


class Trip(NamedTuple):
    """A model to be read and written in another form."""

    run: Run
    target: Path


def to_megatron(rank: int, world: int, trips: Sequence[Trip]) -> list[int]:
    from mswift.engines.megatron_checkpoint import write_checkpoint

    return [write_checkpoint(open_model(trip.run, world), trip.target, max_shard_size="30KB").files for trip in trips]


def to_hf(rank: int, world: int, trips: Sequence[Trip]) -> None:
    for trip in trips:
        open_model(trip.run, world).export_merged(trip.target, max_shard_size="60KB")


def assert_same(one: Path, other: Path) -> None:
    with CheckpointReader(one) as first, CheckpointReader(other) as second:
        assert set(first.names) == set(second.names)
        assert [name for name in first.names if not torch.equal(first.read(name), second.read(name))] == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("megatron")
    return {case: make_checkpoint(folder / case.replace("/", "-"), options_of(case)[0], **options_of(case)[1]) for case in CASES}


@pytest.mark.parametrize(("written", "read"), MIXED_LAYOUTS, ids=["tp-pp", "pp-tp"])
def test_any_layout_reads_what_another_wrote(written: dict[str, Any], read: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    trips = [Trip(Run(source, **written), tmp_path / "m" / case.replace("/", "-")) for case, source in models.items()]
    counts = run_distributed(to_megatron, 2, trips, timeout=240)
    assert counts[0] == counts[1]
    assert min(counts[0]) > 4
    back = [Trip(Run(trip.target, **read), tmp_path / "b" / trip.target.name) for trip in trips]
    run_distributed(to_hf, 2, back, timeout=240)
    alone = [Trip(Run(trip.target), tmp_path / "one" / trip.target.name) for trip in trips]
    run_distributed(to_hf, 1, alone, timeout=240)
    for source, two, one in zip(models.values(), back, alone, strict=True):
        assert_same(source, two.target)
        assert_same(source, one.target)
        assert (one.target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_experts_are_read_on_other_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    source = models["qwen3_moe/plain"]
    run_distributed(to_megatron, 2, [Trip(Run(source, ep=2), tmp_path / "m")], timeout=120)
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m", **SP2), tmp_path / "b")], timeout=120)
    assert_same(source, tmp_path / "b")
    run_distributed(to_megatron, 1, [Trip(Run(source), tmp_path / "m1")], timeout=120)
    run_distributed(to_hf, 2, [Trip(Run(tmp_path / "m1", ep=2), tmp_path / "b1")], timeout=120)
    assert_same(source, tmp_path / "b1")


@pytest.mark.parametrize("layout", [{"ep": 2}, {"pp": 2}], ids=["ep2", "pp2"])
def test_a_router_held_in_fp32_comes_back_in_the_dtype_of_its_source(layout: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model("ernie4_5_moe", dtype=torch.bfloat16, **options_of("ernie4_5_moe/plain")[1]).save_pretrained(source)
    run_distributed(to_megatron, 2, [Trip(Run(source, dtype="bfloat16", **layout), tmp_path / "m")], timeout=120)
    run_distributed(to_hf, 1, [Trip(Run(tmp_path / "m", dtype="bfloat16"), tmp_path / "b")], timeout=120)
    with CheckpointReader(source) as first, CheckpointReader(tmp_path / "b") as second:
        assert {name: first.dtype(name) for name in first.names} == {name: second.dtype(name) for name in second.names}
        assert any(name.endswith("gate.weight") for name in first.names)
    assert_same(source, tmp_path / "b")


def megatrons_own(rank: int, world: int, source: Path, checkpoint: Path) -> list[str]:
    """Names of megatron-core's own GPTModel whose values, read by its own reader, are not ours."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    ours = open_model(Run(source), world)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    theirs = GPTModel(ours.config, spec, ours.description.padding(1).vocab, 64, position_embedding_type="rope")
    state = {"model": theirs.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(str(checkpoint / "release")))}
    theirs.load_state_dict(dist_checkpointing.load(state, str(checkpoint / "release"))["model"])
    own = dict(ours.named_tensors())
    read = dict(theirs.named_parameters())
    assert set(read) == set(own)
    return [name for name, value in read.items() if not torch.equal(value, own[name])]


def read_in_turn(rank: int, world: int, run: Run) -> list[str]:
    """The parameters that are not the same when each is read when it is asked for, and of which more than one is in memory."""
    whole, lazy = dict(open_model(run, world).named_tensors()), open_model(run, world, deferred=True)
    held = dict(lazy.named_tensors())
    for tensor in held.values():
        lazy.release(tensor)
    wrong = []
    for name, tensor in [*held.items(), *held.items()]:
        lazy.ensure(tensor)
        own = sum({other.untyped_storage()._cdata: other.untyped_storage().size() for other in held.values()}.values()) == tensor.nbytes
        if not own or not torch.equal(tensor, whole[name]):
            wrong.append(name)
        lazy.release(tensor)
    return wrong


@pytest.mark.parametrize("case", ["llama/tied", "qwen3_moe/plain"])
def test_each_tensor_is_read_when_it_is_asked_for(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    run_distributed(to_megatron, 1, [Trip(Run(models[case]), tmp_path / "megatron")])
    for directory in (models[case], tmp_path / "megatron"):
        assert run_distributed(read_in_turn, 2, Run(directory, **SP2)) == [[], []]


def test_megatron_core_reads_it_by_itself(models: dict[str, Path], tmp_path: Path) -> None:
    run_distributed(to_megatron, 2, [Trip(Run(models["llama/plain"], pp=2), tmp_path / "m")], timeout=120)
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert run_distributed(megatrons_own, 1, models["llama/plain"], tmp_path / "m", timeout=120) == [[]]


def killed(rank: int, world: int, run: Run, target: Path, form: str, after: int) -> None:
    """A conversion whose process is killed at the `after`th tensor, once what was given away to be written before is written."""
    import os

    calls, deadline = 0, time.monotonic() + 30

    def count() -> None:
        nonlocal calls
        calls += 1
        while calls == after and len(finished(target, form)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(run, world, target, form, count, resume=False)


def finished(target: Path, form: str) -> list[Path]:
    """What a conversion to `target` that is not at its end has finished."""
    draft = target.with_name(f".{target.name}.partial")
    return list(draft.rglob(".*_done")) if form == "mcore" else list(draft.glob("*.safetensors"))


def convert(run: Run, world: int, target: Path, form: str, before: Any, *, resume: bool) -> int:
    from mswift.engines.megatron_checkpoint import write_checkpoint

    model = open_model(run, world, deferred=True)
    ensure = model.ensure

    def watched(tensor: torch.Tensor) -> None:
        before()
        ensure(tensor)

    model.ensure = watched
    if form == "mcore":
        return write_checkpoint(model, target, resume=resume, max_shard_size="30KB").reused
    return model.export_merged(target, max_shard_size="60KB", keep=True, resume=resume).reused


def resumed(rank: int, world: int, run: Run, target: Path, form: str) -> tuple[int, int]:
    """(files that had been finished, tensors that were read)"""
    read: list[int] = []
    return convert(run, world, target, form, lambda: read.append(1), resume=True), len(read)


@pytest.mark.parametrize(("form", "tp"), [("mcore", 1), ("hf", 1), ("hf", 2)])
def test_a_killed_conversion_goes_on_where_it_was(form: str, tp: int, models: dict[str, Path], tmp_path: Path) -> None:
    source, target = models["phi3/plain"], tmp_path / "out"
    with pytest.raises(RankError):
        run_distributed(killed, tp, Run(source, tp=tp), target, form, 14)
    assert not target.exists()
    draft = tmp_path / ".out.partial"
    stamps = {path: path.stat().st_mtime_ns for path in finished(target, form)}
    assert len(stamps) >= 2
    tensors = len(run_distributed(names_of, 1, Run(source))[0])
    reused, read = run_distributed(resumed, tp, Run(source, tp=tp), target, form)[0]
    assert reused == len(stamps)
    assert 0 < read < tensors
    if form == "mcore":
        run_distributed(to_hf, 1, [Trip(Run(target), tmp_path / "back")])
    assert_same(source, tmp_path / "back" if form == "mcore" else target)
    assert not draft.exists()
    assert not [path for path in target.rglob("*") if path.name.startswith(".") and path.name != ".metadata"]


def names_of(rank: int, world: int, run: Run) -> list[str]:
    return [name for name, _ in open_model(run, world).named_tensors()]


def test_a_draft_of_something_else_is_not_gone_on_with(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_distributed(killed, 1, Run(models["phi3/plain"]), tmp_path / "out", "mcore", 14)
    with pytest.raises(RankError, match="was begun from another source"):
        run_distributed(resumed, 1, Run(models["llama/plain"]), tmp_path / "out", "mcore")


def faults(rank: int, world: int, checkpoint: Path, other: Path) -> list[str]:
    """What is said of a damaged checkpoint, of one without its index, and of one of another model."""
    said = []
    for path in (checkpoint, other):
        with pytest.raises((CheckpointError, ConversionError)) as caught:
            open_model(Run(path), world)
        said.append(str(caught.value))
    return said


def test_what_cannot_be_read_is_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    trips = [Trip(Run(models["llama/plain"]), tmp_path / name) for name in ("cut", "swapped")]
    run_distributed(to_megatron, 1, trips)
    largest = max((tmp_path / "cut" / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    (tmp_path / "swapped" / "config.json").write_bytes((models["olmo2/one-group"] / "config.json").read_bytes())
    cut, swapped = run_distributed(faults, 1, tmp_path / "cut", tmp_path / "swapped")[0]
    assert "convert it again" in cut
    assert "missing from the checkpoint" in swapped
    assert "that no parameter reads" in swapped
    assert "\n" not in cut + swapped


def adapter_there_and_back(rank: int, world: int, run: Run, megatron: Path, base: Run, peft: Path) -> None:
    from mswift.engines.megatron_checkpoint import read_adapter, write_adapter

    write_adapter(open_model(run, world), megatron, base_model=str(run.checkpoint))
    back = open_model(base, world)
    read_adapter(back, megatron)
    back.export_adapter(peft, base_model=str(run.checkpoint))


def test_an_adapter_goes_to_megatron_and_back(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = models["llama/plain"]
    peft = make_peft_adapter(base, tmp_path / "peft")
    run_distributed(adapter_there_and_back, 2, Run(base, tp=2, adapter=peft), tmp_path / "m", Run(base, pp=2), tmp_path / "back", timeout=120)
    wanted, got = (load_file(folder / "adapter_model.safetensors") for folder in (peft, tmp_path / "back"))
    scales = [read_peft(folder).scale for folder in (peft, tmp_path / "back")]
    assert set(got) == set(wanted)
    assert scales[0] == pytest.approx(scales[1])
    for name in (name for name in wanted if name.endswith("lora_A.weight")):  # ranks may differ by zeros: the layers have one rank
        other = name.replace("lora_A", "lora_B")
        assert torch.allclose(got[other] @ got[name], wanted[other] @ wanted[name], rtol=1e-6, atol=1e-7), name
