"""Exporting from one process: what was loaded comes back bit for bit, and nothing half-written is ever seen."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mswift.conversion import staging
from mswift.conversion.collective import ExportGroups, Spread
from mswift.conversion.export import ExportReport, export_model
from mswift.conversion.export_plan import ExportParameter
from mswift.conversion.load import LocalParameter, load_weights
from mswift.conversion.rules import Rename
from mswift.conversion.safetensors_io import CheckpointReader
from mswift.conversion.shards import Shard
from mswift.errors import ConversionError
from tests.unit.conversion.synthetic import Model, Tensors, equal_bits, local_parameters, write_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "name": "你好"}


def parameters_of(model: Model, hf: Tensors) -> list[ExportParameter]:
    return [ExportParameter.of(parameter) for parameter in local_parameters(model.megatron(hf, 0, 1), 0, 1)]


def export(model: Model, hf: Tensors, target: Path, **more: object) -> ExportReport:
    return export_model(parameters_of(model, hf), model.rules(), target, **{"config": CONFIG} | more)  # type: ignore[arg-type]


def read_all(directory: Path) -> Tensors:
    with CheckpointReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_shard_size", ["5GB", 2000, 1])
def test_hf_to_megatron_to_hf(tmp_path: Path, tied: bool, dtype: torch.dtype, max_shard_size: str | int) -> None:
    model = Model(tied=tied, dtype=dtype)
    hf = model.tensors()
    local = local_parameters(model.megatron(hf, 0, 1), 0, 1, torch.zeros_like)
    with CheckpointReader(write_checkpoint(tmp_path / "in", hf)) as reader:
        load_weights(local, model.rules(), reader)
    report = export_model(map(ExportParameter.of, local), model.rules(), tmp_path / "out", config=CONFIG, max_shard_size=max_shard_size)
    assert equal_bits(read_all(tmp_path / "out"), hf)
    assert (report.tensors, report.bytes) == (len(hf), sum(tensor.nbytes for tensor in hf.values()))
    assert report.own_bytes == report.bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if max_shard_size == "5GB":
        assert files == ["model.safetensors"]
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == report.bytes
        assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
        held = [safetensors.torch.load_file(tmp_path / "out" / name) for name in files]
        assert all(len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= int(max_shard_size) for tensors in held)
        assert equal_bits({name: tensor for tensors in held for name, tensor in tensors.items()}, hf)


def test_config_and_extra_files(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    (tmp_path / "tokenizer.json").write_text("tokens")
    export(model, hf, tmp_path / "a", extra_files=[tmp_path / "tokenizer.json"])
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == CONFIG | {"torch_dtype": "bfloat16"}
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "tokens"
    export(model, hf, tmp_path / "b", config=b"{ }")
    assert (tmp_path / "b" / "config.json").read_bytes() == b"{ }"
    export(model, hf, tmp_path / "c", config=tmp_path / "a" / "config.json")
    assert (tmp_path / "c" / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()
    export(model, hf, tmp_path / "d", config={})
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == {"dtype": "bfloat16"}
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_cast_rounds_once(tmp_path: Path) -> None:
    model = Model(dtype=torch.float32)
    hf = model.tensors()
    export(model, hf, tmp_path / "out", dtype=torch.bfloat16)
    assert equal_bits(read_all(tmp_path / "out"), {name: tensor.to(torch.bfloat16) for name, tensor in hf.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_wider_value_is_rounded_to_what_is_written(tmp_path: Path) -> None:
    """A merge computes in fp32; a bf16 export rounds it once, an fp32 export not at all."""
    wide = torch.randn(5, 3)
    parameter = ExportParameter("w", (5, 3), torch.bfloat16, Shard(), lambda: wide)
    export_model([parameter], [Rename("w", "x")], tmp_path / "bf16", config={})
    export_model([parameter], [Rename("w", "x")], tmp_path / "fp32", config={}, dtype=torch.float32)
    assert equal_bits(read_all(tmp_path / "bf16"), {"x": wide.bfloat16()})
    assert equal_bits(read_all(tmp_path / "fp32"), {"x": wide})


def test_integers_keep_their_type_under_a_cast(tmp_path: Path) -> None:
    parameters = [LocalParameter("a", torch.tensor([1.0]), Shard()), LocalParameter("b", torch.tensor([3]), Shard())]
    rules = [Rename("a", "x.a"), Rename("b", "x.b")]
    export_model(map(ExportParameter.of, parameters), rules, tmp_path / "out", config={}, dtype=torch.bfloat16)
    assert equal_bits(read_all(tmp_path / "out"), {"x.a": torch.tensor([1.0], dtype=torch.bfloat16), "x.b": torch.tensor([3])})


def test_values_are_made_one_at_a_time(tmp_path: Path) -> None:
    model = Model()
    hf = model.tensors()
    order: list[str] = []

    def lazily(parameter: ExportParameter) -> ExportParameter:
        return replace(parameter, value=lambda: (order.append(parameter.name), parameter.value())[1])

    steps: list[tuple[int, int]] = []
    parameters = [lazily(parameter) for parameter in parameters_of(model, hf)]
    export_model(parameters, model.rules(), tmp_path / "out", config={}, progress=lambda *step: steps.append(step))
    assert order == [parameter.name for parameter in parameters]
    assert len(steps) == len(parameters)
    assert steps[-1][0] == steps[-1][1] == sum(tensor.nbytes for tensor in hf.values())


def test_the_target_is_not_overwritten(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    (tmp_path / "out").mkdir()
    export(model, hf, tmp_path / "out")  # an empty directory is as good as none
    (tmp_path / "out" / "stale.json").write_text("{}")
    with pytest.raises(ConversionError, match="is not empty"):
        export(model, hf, tmp_path / "out")
    changed = model.tensors(seed=1)
    export(model, changed, tmp_path / "out", exist_ok=True)
    assert equal_bits(read_all(tmp_path / "out"), changed)
    assert not (tmp_path / "out" / "stale.json").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(ConversionError, match="something other than a model"):
        export(model, hf, tmp_path / "home", exist_ok=True)
    with pytest.raises(ConversionError, match="is a file"):
        export(model, hf, tmp_path / "home" / "thesis.tex")
    with pytest.raises(ConversionError, match="cannot write beside"):
        export(model, hf, tmp_path / "home" / "thesis.tex" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    good = parameters_of(model, hf)

    def explode() -> torch.Tensor:
        raise RuntimeError("no merge today")

    cases = [
        (replace(good[3], value=explode), RuntimeError, "no merge today"),
        (replace(good[3], value=lambda: torch.zeros(1)), ConversionError, "its value has"),
    ]
    for bad, kind, text in cases:
        with pytest.raises(kind, match=text):
            export_model([*good[:3], bad, *good[4:]], model.rules(), tmp_path / "out", config={})
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConversionError, match=r"1 file to copy \(.*absent.json\) not found"):
        export(model, hf, tmp_path / "out", extra_files=[tmp_path / "absent.json"])
    with pytest.raises(ConversionError, match=r"cannot write .*: No such file"):
        export(model, hf, tmp_path / "out", config=tmp_path / "absent.json")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_what_is_finished_for_resume(tmp_path: Path) -> None:
    model = Model(layers=1)
    hf = model.tensors()
    good = parameters_of(model, hf)
    target, draft = tmp_path / "out", tmp_path / ".out.partial"
    common = {"config": CONFIG, "max_shard_size": 1, "source": {"model": "a"}}

    def fail_at(place: int, **more: object) -> None:
        bad = replace(good[place], value=lambda: torch.zeros(1))
        export_model([*good[:place], bad, *good[place + 1 :]], model.rules(), target, **common | more)  # type: ignore[arg-type]

    with pytest.raises(ConversionError, match="its value has") as caught:
        fail_at(0)
    assert "--resume" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing was finished, so nothing is worth keeping"
    with pytest.raises(ConversionError, match="finished files are kept: the same command with --resume true goes on"):
        fail_at(3)
    finished = {path.name: path.stat().st_mtime_ns for path in draft.glob("*.safetensors")}
    assert finished
    report = export_model(good, model.rules(), target, resume=True, **common)  # type: ignore[arg-type]
    assert report.reused == len(finished)
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    assert equal_bits(read_all(target), hf)
    assert not draft.exists()


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    hf = model.tensors()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(ConversionError, match=r"cannot write .*: File too large"):
            export(model, hf, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    usage = staging.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ConversionError, match=r"0.07 GB are to be written and .* has 0.00 GB free"):
        export(model, hf, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_model_and_rules_must_match(tmp_path: Path) -> None:
    model = Model(layers=1)
    parameters, rules = parameters_of(model, model.tensors()), model.rules()
    extra = ExportParameter.of(LocalParameter("copy", torch.zeros(12), Shard()))
    with pytest.raises(ConversionError, match=r"1 rule \(.*\) without a parameter"):
        export_model(parameters[1:], rules, tmp_path / "out", config={})
    with pytest.raises(ConversionError, match=r"1 parameter \(.*embedding.*\) without a rule"):
        export_model(parameters, rules[1:], tmp_path / "out", config={})
    with pytest.raises(ConversionError, match=r"1 tensor \(model.norm.weight\) whose rows are not all there once"):
        export_model([*parameters, extra], [*rules, Rename("copy", "model.norm.weight")], tmp_path / "out", config={})
    with pytest.raises(ConversionError, match=r"tp\(2\) x places\(1\) x replicas\(1\) = 2 ranks, but 1 process"):
        ExportGroups({"tp": Spread(num_shards=2)})
    with pytest.raises(ConversionError, match="size 'big' is not understood"):
        export_model(parameters, rules, tmp_path / "out", config={}, max_shard_size="big")
    assert list(tmp_path.iterdir()) == []
