"""Slabs of one tensor: each rank reads the part that torch cuts by hand, and what is written from all ranks is the file that was read."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.conversion.coverage import source_rows
from mswift.conversion.export import export_model
from mswift.conversion.export_plan import ExportParameter
from mswift.conversion.load import LocalParameter, fill, load_weights
from mswift.conversion.rules import GatedSlab, Slab, Stack
from mswift.conversion.safetensors_io import CheckpointReader, ShardWriter, TensorSpec, save_file
from mswift.conversion.shards import Shard, cut_sources, source_slices, take
from mswift.conversion.stacks import SlabWriter
from mswift.errors import ConversionError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a layer of experts, and how a file holds them. `tp` divides `ffn`."""

    count: int
    ffn: int
    hidden: int
    tp: int
    transposed: bool
    woven: bool
    dtype: torch.dtype

    def experts(self) -> list[Tensors]:
        """fc1 ``[gate; up]``, fc2 and their biases of every expert, every value different."""
        shapes = {"fc1": (2 * self.ffn, self.hidden), "fc1b": (2 * self.ffn,), "fc2": (self.hidden, self.ffn), "fc2b": (self.hidden,)}
        return [{name: torch.randn(shape).to(self.dtype) for name, shape in shapes.items()} for _ in range(self.count)]

    def stacked(self, experts: list[Tensors]) -> Tensors:
        """The tensors of the file, made by hand."""

        def weave(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2)
            return torch.stack((gate, up), 1).flatten(0, 1) if self.woven else x

        def turn(x: torch.Tensor) -> torch.Tensor:
            return x.t() if self.transposed and x.dim() == 2 else x

        parts = {name: [weave(e[name]) if name.startswith("fc1") else e[name] for e in experts] for name in experts[0]}
        return {f"{name}s": torch.stack([turn(x) for x in part]).contiguous() for name, part in parts.items()}

    def rules(self) -> list[Slab]:
        found: list[Slab] = []
        for index in range(self.count):
            for kind in ("", "b"):
                found.append(GatedSlab(f"{index}.fc1{kind}", f"fc1{kind}s", index, self.count, self.transposed, self.woven))
                found.append(Slab(f"{index}.fc2{kind}", f"fc2{kind}s", index, self.count, self.transposed))
        return found


DIMS = {"fc1": 0, "fc1b": 0, "fc2": 1, "fc2b": None}
SMALL = st.integers(1, 4)
SIZES = st.builds(
    lambda count, part, hidden, tp, transposed, woven, dtype: Sizes(count, part * tp, hidden, tp, transposed, woven, dtype),
    *(SMALL, SMALL, SMALL, SMALL, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16])),
)


def whole_of(rule: Slab, experts: list[Tensors]) -> tuple[torch.Tensor, int | None]:
    index, name = rule.target.split(".")
    return experts[int(index)][name], DIMS[name]


@settings(deadline=None)
@given(SIZES)
def test_every_rank_reads_its_part_and_all_write_the_file_again(sizes: Sizes) -> None:
    experts = sizes.experts()
    tensors = sizes.stacked(experts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        save_file(folder / "model.safetensors", tensors)
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        slabs = SlabWriter()
        with CheckpointReader(folder) as reader, ShardWriter(folder / "again", specs) as writer:
            for rule in sizes.rules():
                whole, dim = whole_of(rule, experts)
                shapes = rule.source_shapes(tuple(whole.shape))
                assert shapes == {rule.source: reader.shape(rule.source)}
                shards = []
                for rank in range(sizes.tp):
                    shard = Shard(dim, rank, sizes.tp)
                    wanted = take(whole, shard, rule.parts)
                    got = torch.full_like(wanted, float("nan"))
                    fill(got, source_slices(rule.pieces(shapes), shard, tuple(whole.shape), rule.parts), reader, rule.stack)
                    assert torch.equal(got, wanted)
                    shards.append(got)
                shards = shards if dim is not None else shards[:1]
                for source, row, values in cut_sources(rule.pieces(shapes), shards, dim if len(shards) > 1 else None, rule.parts):
                    for first, ready in slabs.add(source, rule.stack, shapes[source], row, values):
                        writer.write(source, ready, first)
        assert (folder / "again").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("transposed", "woven"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_model_of_slabs_comes_back_by_load_and_export(transposed: bool, woven: bool, tmp_path: Path) -> None:
    sizes = Sizes(3, 4, 5, 1, transposed, woven, torch.bfloat16)
    experts = sizes.experts()
    tensors = sizes.stacked(experts)
    (tmp_path / "config.json").write_text("{}")
    save_file(tmp_path / "model.safetensors", tensors)
    rules = sizes.rules()
    parameters = [LocalParameter(rule.target, torch.full_like(whole_of(rule, experts)[0], float("nan")), Shard()) for rule in rules]
    with CheckpointReader(tmp_path) as reader:
        report = load_weights(parameters, rules, reader)
        assert report.bytes == reader.nbytes
    for parameter, rule in zip(parameters, rules, strict=True):
        assert torch.equal(parameter.tensor, whole_of(rule, experts)[0])
    export_model([ExportParameter.of(parameter) for parameter in parameters], rules, tmp_path / "out", config={})
    with CheckpointReader(tmp_path / "out") as reader:
        assert set(reader.names) == set(tensors)
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_swapped_gate_and_up_or_an_untwisted_file_would_show() -> None:
    sizes = Sizes(2, 4, 5, 1, True, True, torch.float32)
    experts = sizes.experts()
    woven, plain = sizes.stacked(experts), replace(sizes, woven=False).stacked(experts)
    assert not torch.equal(woven["fc1s"], plain["fc1s"])
    assert torch.equal(woven["fc1s"][1, :, 0::2].t(), experts[1]["fc1"][:4])
    assert torch.equal(woven["fc1s"][1, :, 1::2].t(), experts[1]["fc1"][4:])


def test_an_expert_that_no_rule_fills_is_named() -> None:
    rules = {rule.target: rule for rule in Sizes(3, 4, 5, 1, True, True, torch.float32).rules() if not rule.target.startswith("1.")}
    shapes = {target: (8, 5) if target.endswith("fc1") else (8,) if target.endswith("fc1b") else (5, 4)[: 2 - target.count("b")] for target in rules}
    _, problems = source_rows(rules, shapes)
    assert problems == ["4 tensors (fc1bs, fc1s, fc2bs, fc2s) whose rows are not all there once"]


def test_what_a_slab_cannot_fill() -> None:
    with pytest.raises(ConversionError, match="fc1 has 7 rows, its rule makes an even number"):
        GatedSlab("fc1", "fc1s", 0, 2).source_shapes((7, 3))
    with pytest.raises(ConversionError, match="scale is a scalar"):
        Slab("scale", "scales", 0, 2).source_shapes(())
    assert Stack().plain
    assert not Stack(woven=2).plain
