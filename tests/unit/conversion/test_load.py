"""Loading: shards equal those cut by hand for every layout, and whatever does not add up is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mswift.conversion.load import LoadReport, LocalParameter, all_names, load_weights, plan_load
from mswift.conversion.rules import Drop, Rename
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.conversion.shards import Shard
from mswift.errors import ConversionError, ModelError
from tests.unit.conversion.synthetic import Model, Tensors, equal_bits, local_parameters, write_checkpoint


def nans(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


def load(directory: Path, model: Model, wanted: Tensors, **more: object) -> tuple[Tensors, LoadReport]:
    parameters = local_parameters(wanted, 0, 1, nans)
    with CheckpointReader(directory) as reader:
        report = load_weights(parameters, model.rules(), reader, **more)  # type: ignore[arg-type]
    return {parameter.name: parameter.tensor for parameter in parameters}, report


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "num_stages"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
def test_every_rank_gets_its_shards(tmp_path: Path, tied: bool, dtype: torch.dtype, size: int, num_stages: int) -> None:
    model = Model(tied=tied, dtype=dtype)
    hf = model.tensors()
    model_parameters = {name for stage in range(num_stages) for name in model.megatron(hf, 0, size, stage, num_stages)}
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader:
        for stage in range(num_stages):
            for rank in range(size):
                wanted = model.megatron(hf, rank, size, stage, num_stages)
                parameters = local_parameters(wanted, rank, size, nans)
                report = load_weights(parameters, model.rules(), reader, model_parameters=model_parameters)
                assert equal_bits({parameter.name: parameter.tensor for parameter in parameters}, wanted)
                assert report.tensors == len(wanted)
                assert report.casts == {}


def test_only_the_needed_bytes_are_read(tmp_path: Path) -> None:
    model = Model()
    hf = model.tensors()
    done: list[tuple[int, int]] = []
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader:
        wanted = model.megatron(hf, 3, 4)
        report = load_weights(local_parameters(wanted, 3, 4), model.rules(), reader, progress=lambda *step: done.append(step))
    padding = 2 * (model.padded - model.vocab) * model.hidden * 2  # rows of zeros come from no file; both vocabularies end on rank 3
    assert report.bytes == sum(tensor.nbytes for tensor in wanted.values()) - padding
    assert done[-1] == (report.bytes, report.bytes)
    assert len(done) == len(wanted)
    assert done == sorted(done)


def test_one_parameter_has_memory_at_a_time(tmp_path: Path) -> None:
    model = Model()
    hf = model.tensors()
    wanted = model.megatron(hf, 1, 2)
    parameters = local_parameters(wanted, 1, 2)
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader:
        plan = plan_load(parameters, model.rules(), reader)
        views = [parameter.tensor[1:] for parameter in parameters]
        for view in views:
            plan.release(view)
        held = [parameter.tensor.untyped_storage() for parameter in parameters]
        assert [storage.size() for storage in held] == [0] * len(held)
        for parameter, view in zip(parameters, views, strict=True):
            for _ in range(2):
                plan.fill(view)
                plan.fill(parameter.tensor)
                assert equal_bits({"": parameter.tensor}, {"": wanted[parameter.name]})
                assert sum(storage.size() for storage in held) == parameter.tensor.nbytes
                plan.release(parameter.tensor)
        larger = torch.zeros(2, *parameters[0].tensor.shape, dtype=parameters[0].tensor.dtype)
        part = replace(parameters[0], tensor=larger[0])
        plan = plan_load([part, *local_parameters(wanted, 1, 2)[1:]], model.rules(), reader)
        plan.fill(part.tensor)
        plan.release(part.tensor)  # its memory is not its own
        assert equal_bits({"": larger[0]}, {"": wanted[part.name]})


def test_what_is_read_apart_is_not_read_in_place(tmp_path: Path) -> None:
    model = Model()
    hf = model.tensors()
    wanted = model.megatron(hf, 1, 2)
    parameters = local_parameters(wanted, 1, 2, nans)
    apart = parameters[2]
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader:
        plan = plan_load(parameters, model.rules(), reader)
        first = plan.read(apart.name)
        plan.forget(apart.name)
        plan.fill(apart.tensor)
        plan.fill_all()
        again = plan.read(apart.name)
    assert equal_bits({"first": first, "again": again}, {"first": wanted[apart.name], "again": wanted[apart.name]})
    assert bool(apart.tensor.isnan().all()), "its memory was left alone"
    assert equal_bits({p.name: p.tensor for p in parameters if p is not apart}, {name: wanted[name] for name in wanted if name != apart.name})
    assert plan.done == plan.total


def test_casts_are_said(tmp_path: Path) -> None:
    model = Model()
    hf = model.tensors()
    wanted = {name: tensor.float() for name, tensor in model.megatron(hf, 0, 1).items()}
    got, report = load(write_checkpoint(tmp_path, hf), model, wanted)
    assert equal_bits(got, wanted)
    assert report.casts == {"bfloat16 -> float32": len(wanted)}


def test_values_that_need_more_than_a_cast_are_refused(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    wanted = model.megatron(hf, 0, 1)
    hf["model.norm.weight"] = hf["model.norm.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(ConversionError, match=r"model.norm.weight is float8_e4m3fn, which cannot become bfloat16 by a plain cast"):
        load(write_checkpoint(tmp_path, hf), model, wanted)


def test_every_gap_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = Model()
    hf = model.tensors()
    wanted = model.megatron(hf, 0, 1)
    del hf["model.layers.1.mlp.up_proj.weight"], wanted["decoder.layers.0.input_layernorm.weight"]
    hf["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)
    hf["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    parameters = [*local_parameters(wanted, 0, 1, nans), LocalParameter("decoder.layers.0.extra", torch.ones(1), Shard())]
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader, pytest.raises(ConversionError) as caught:
        load_weights(parameters, model.rules(), reader)
    message = str(caught.value)
    assert "1 parameter (decoder.layers.0.extra) without a rule" in message
    assert "1 rule (decoder.layers.0.input_layernorm.weight) without a parameter" in message
    assert "1 tensor (model.layers.1.mlp.up_proj.weight) missing from the checkpoint" in message
    assert "1 tensor (model.layers.0.self_attn.q_norm.weight) that no rule reads" in message
    assert "inv_freq" not in message
    assert "\n" not in message
    assert all(parameter.tensor.isnan().all() for parameter in parameters[:-1])


def test_wrong_shapes_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = Model(layers=12)
    hf = model.tensors()
    wanted = model.megatron(hf, 0, 1)
    for layer in range(12):
        hf[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.zeros(12, 21)
    parameters = local_parameters(wanted, 0, 1, nans)
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader, pytest.raises(ConversionError) as caught:
        load_weights(parameters, model.rules(), reader)
    assert "model.layers.0.mlp.down_proj.weight has shape (12, 21), the model wants (12, 20)" in str(caught.value)
    assert "and 4 more" in str(caught.value)
    assert all(parameter.tensor.isnan().all() for parameter in parameters)


def test_a_model_that_its_rules_do_not_describe(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    wanted = model.megatron(hf, 0, 1)
    wanted["decoder.layers.0.self_attention.linear_qkv.bias"] = torch.zeros(7)
    with pytest.raises(ConversionError, match=r"linear_qkv.bias has 7 rows, its rule makes 48"):
        load(write_checkpoint(tmp_path, hf), model, wanted)


def test_names_are_unique(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    twice = local_parameters(model.megatron(hf, 0, 1), 0, 1) * 2
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader:
        with pytest.raises(ConversionError, match="one name"):
            load_weights(twice, model.rules(), reader)
        with pytest.raises(ConversionError, match=r"two rules fill decoder.final_layernorm.weight"):
            load_weights(twice[:1], [*model.rules(), Rename("decoder.final_layernorm.weight", "x")], reader)


def test_a_tied_head_must_equal_its_embedding(tmp_path: Path) -> None:
    model = Model(tied=True, layers=1)
    hf = model.tensors()
    wanted = model.megatron(hf, 0, 1)
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"].clone()
    got, _ = load(write_checkpoint(tmp_path / "same", hf), model, wanted)
    assert equal_bits(got, wanted)
    hf["lm_head.weight"][-1, -1] += 1
    longer = torch.cat([hf["model.embed_tokens.weight"], torch.ones(1, 12, dtype=torch.bfloat16)])  # equal as far as the embedding goes
    for index, other in enumerate([hf["lm_head.weight"], longer, hf["model.embed_tokens.weight"].float()]):
        directory = write_checkpoint(tmp_path / str(index), hf | {"lm_head.weight": other})
        with pytest.raises(ConversionError, match=r"lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
            load(directory, model, wanted)


def test_only_the_rank_with_the_odd_row_sees_it(tmp_path: Path) -> None:
    """Each rank compares the rows it holds, so that together they compare all."""
    model = Model(tied=True, layers=1)
    hf = model.tensors()
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"].clone()
    hf["lm_head.weight"][25] += 1
    failed = []
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader:
        for rank in range(4):
            try:
                load_weights(local_parameters(model.megatron(hf, rank, 4), rank, 4), model.rules(), reader)
            except ConversionError:
                failed.append(rank)
    assert failed == [2]  # rows 20 to 29


def test_a_model_of_other_rules(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    rules = [rule for rule in model.rules() if getattr(rule, "target", "") != "output_layer.weight"]
    wanted = model.megatron(hf, 0, 1)
    del wanted["output_layer.weight"]
    directory = write_checkpoint(tmp_path, hf)
    with CheckpointReader(directory) as reader:
        with pytest.raises(ConversionError, match=r"1 tensor \(lm_head.weight\) that no rule reads"):
            load_weights(local_parameters(wanted, 0, 1), rules, reader)
        report = load_weights(local_parameters(wanted, 0, 1), [*rules, Drop(r"lm_head\.weight", "a value head")], reader)
    assert report.tensors == len(wanted)


def test_parameters_with_gradients_views_and_other_layouts(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    wanted = model.megatron(hf, 0, 1)
    parameters = [replace(p, tensor=torch.nn.Parameter(nans(p.tensor))) for p in local_parameters(wanted, 0, 1)]
    flat = torch.full((wanted["decoder.layers.0.mlp.linear_fc2.weight"].numel(),), float("nan"), dtype=torch.bfloat16)
    for index, parameter in enumerate(parameters):
        if parameter.name.endswith("linear_fc2.weight"):
            parameters[index] = replace(parameter, tensor=flat.view(20, 12).t())  # not contiguous
    with CheckpointReader(write_checkpoint(tmp_path, hf)) as reader:
        load_weights(parameters, model.rules(), reader)
    assert equal_bits({p.name: p.tensor.detach() for p in parameters}, wanted)
    assert not flat.isnan().any()


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    write_checkpoint(tmp_path, hf)
    with CheckpointReader(tmp_path) as reader:
        with open(tmp_path / "model-00002-of-00002.safetensors", "r+b") as file:
            file.truncate(2000)
        with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors is truncated"):
            load_weights(local_parameters(model.megatron(hf, 0, 1), 0, 1), model.rules(), reader)


def test_all_names_of_one_process() -> None:
    parameters = [LocalParameter("b", torch.ones(1), Shard()), LocalParameter("a", torch.ones(1), Shard())]
    assert all_names(parameters) == {"a", "b"}
