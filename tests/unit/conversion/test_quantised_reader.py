"""Quantised checkpoints read as plain ones: values, slices, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.conversion import quantised
from mswift.conversion.quantised import QuantisedReader, open_checkpoint
from mswift.conversion.safetensors_io import CheckpointReader, SafetensorsFile, TensorSpec
from mswift.errors import ModelError
from tests.unit.conversion.quantisers import CASES, FP8, MODULE, Case, Made, Tensors, compressed, write

NORM = {"model.norm.weight": torch.arange(4.0).bfloat16()}
EVERY = pytest.mark.parametrize("case", CASES)
ONE_OF_EACH = ("fp8-ragged-blocks", "compressed-int4-groups", "compressed-int8-zero-points", "gptq", "awq", "nf4-double", "mxfp4")


def opened(directory: Path, case: Case, stored: Tensors, **settings: Any) -> Any:
    return open_checkpoint(write(directory, {**NORM, **stored}, {**case.settings, **settings}, case.dtype))


def expected_of(made: Made, case: Case) -> torch.Tensor:
    return torch.from_numpy(made.expected.copy()).to(getattr(torch, case.dtype))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@EVERY
@pytest.mark.parametrize("chunk", [2**21, 4001])
def test_a_weight_is_what_its_format_defines(case: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_CHUNK", chunk)
    made = CASES[case].made()
    with opened(tmp_path, CASES[case], made.stored) as reader:
        wanted = expected_of(made, CASES[case])
        assert isinstance(reader, QuantisedReader)
        assert sorted(reader.names) == sorted([*NORM, made.plain])
        assert reader.spec(made.plain) == TensorSpec(wanted.dtype, tuple(wanted.shape))
        assert torch.equal(bits(reader.read(made.plain)), bits(wanted))
        assert torch.equal(reader.read("model.norm.weight"), NORM["model.norm.weight"])
        assert reader.nbytes == wanted.nbytes + 8


@pytest.fixture(scope="module")
def open_cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, str, torch.Tensor]]]:
    found = {}
    for name, case in CASES.items():
        made = case.made()
        found[name] = (opened(tmp_path_factory.mktemp("case"), case, made.stored), made.plain, expected_of(made, case))
    yield found
    for reader, _, _ in found.values():
        reader.close()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_slice_is_that_of_the_whole(data: st.DataObject, open_cases: dict[str, tuple[Any, str, torch.Tensor]]) -> None:
    reader, name, whole = open_cases[data.draw(st.sampled_from(sorted(CASES)))]
    spans = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in whole.shape[:2]]
    rows = data.draw(st.sampled_from([None, slice(*spans[0])]))
    columns = data.draw(st.sampled_from([None, slice(*spans[1])]))
    wanted = whole[rows or slice(None), columns or slice(None)]
    got = reader.read(name, rows, columns)
    assert got.shape == wanted.shape
    assert torch.equal(bits(got), bits(wanted))


@EVERY
def test_every_missing_part_is_named(case: str, tmp_path: Path) -> None:
    made = CASES[case].made()
    for part in made.scales:
        rest = {name: tensor for name, tensor in made.stored.items() if name != part}
        message = rf"^{tmp_path}: {made.plain.removesuffix('.weight')}[^ ]* is stored quantised without its ([^ ]* or )?{part}( or [^ ]*)?; download"
        with pytest.raises(ModelError, match=message) as caught:
            opened(tmp_path, CASES[case], rest)
        assert "\n" not in str(caught.value)


@EVERY
def test_a_scale_alone_is_named(case: str, tmp_path: Path) -> None:
    made = CASES[case].made()
    for part in made.scales:
        with pytest.raises(ModelError, match=rf"1 scale \({part}\) without a quantised weight; download"):
            opened(tmp_path, CASES[case], {part: made.stored[part]})


@EVERY
def test_a_scale_of_another_shape_is_named(case: str, tmp_path: Path) -> None:
    made = CASES[case].made()
    for part in made.scales:
        if "quant_state" in part:  # whatever its shape, it is read as JSON
            continue
        wrong = torch.zeros(7, 3, dtype=torch.uint8).to(made.stored[part].dtype)
        with pytest.raises(ModelError, match=rf"{part} has shape \(7, 3\), wanted "):
            opened(tmp_path, CASES[case], {**made.stored, part: wrong})


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_what_is_said_to_be_plain_is_not_quantised(case: str, tmp_path: Path) -> None:
    made = CASES[case].made()
    key = "ignore" if "compressed" in CASES[case].settings["quant_method"] else "modules_to_not_convert"
    with opened(tmp_path, CASES[case], made.stored, **{key: ["lm_head", "model.layers.1", "model.layers.0.mlp.down"]}) as reader:
        assert made.plain in reader.names
    module = made.plain.removesuffix(".weight")
    for entry in (module, r"re:.*layers\.\d.mlp" if key == "ignore" else r"model.layers.*.mlp"):
        with pytest.raises(ModelError, match=rf"1 module \({module}\) quantised although quantization_config says not; mend"):
            opened(tmp_path, CASES[case], made.stored, **{key: [entry]})


def test_a_part_is_read_and_not_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    read = SafetensorsFile._read_exactly

    def counting(self: SafetensorsFile, view: memoryview, offset: int) -> None:
        counted.append(view.nbytes)
        read(self, view, offset)

    for case in ONE_OF_EACH:
        made = CASES[case].made()
        with opened(tmp_path / case, CASES[case], made.stored) as reader:
            monkeypatch.setattr(SafetensorsFile, "_read_exactly", counting)
            rows, columns = reader.shape(made.plain)[:2]
            whole = sum(made.stored[part].nbytes for part in made.stored)
            for part in ({"rows": slice(0, max(1, rows // 4))}, {"columns": slice(columns // 2, columns // 2 + columns // 4)}):
                counted.clear()
                reader.read(made.plain, **part)
                assert 0 < sum(counted) < 0.45 * whole, (case, part)
            monkeypatch.undo()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "quanto"},
            r"weights quantised by 'quanto' are not read; wanted one of awq, .*, mxfp4, or plain weights$",
        ),
        ({}, "weights quantised by None are not read"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size = \[128\] in quantization_config, wanted two positive sizes"),
        ({**FP8, "expert_dtype": "fp4"}, "fp8 weights with expert_dtype = 'fp4' are not read, wanted fp8"),
    ],
)
def test_settings_that_are_not_read_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(write(tmp_path, NORM, settings))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_without_settings_fp8_is_refused_and_plain_weights_are_as_before(tmp_path: Path) -> None:
    made = CASES["fp8-blocks"].made()
    with pytest.raises(ModelError, match=rf"1 tensor \({MODULE}.weight\) of fp8, but config.json has no quantization_config to say how"):
        open_checkpoint(write(tmp_path, {**NORM, **made.stored}, None))
    with open_checkpoint(write(tmp_path, NORM, None)) as reader:
        assert isinstance(reader, CheckpointReader)
        assert reader.names == list(NORM)


def test_integers_that_the_method_does_not_explain_are_refused(tmp_path: Path) -> None:
    made = CASES["fp8-blocks"].made()
    with pytest.raises(ModelError, match=r"1 tensor \(other.weight\) of integers or fp8 that fp8 does not explain; take another checkpoint"):
        opened(tmp_path, CASES["fp8-blocks"], {**made.stored, "other.weight": torch.zeros(2, 2, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"x.weight is quantised and has shape \(2, 2, 2\), wanted two dims"):
        opened(tmp_path, CASES["fp8-blocks"], {"x.weight": torch.zeros(2, 2, 2).to(torch.float8_e4m3fn), "x.weight_scale": torch.ones(())})


def test_the_dtype_is_that_of_the_config_or_bf16(tmp_path: Path) -> None:
    made = CASES["fp8-blocks"].made()
    with open_checkpoint(write(tmp_path, made.stored, FP8, dtype=None)) as reader:
        assert reader.dtype(made.plain) == torch.bfloat16
    with open_checkpoint(write(tmp_path, made.stored, FP8, dtype=None, torch_dtype="float32")) as reader:
        assert torch.equal(reader.read(made.plain), torch.from_numpy(made.expected))
    with pytest.raises(ModelError, match=r"dtype float64 of a quantised checkpoint, wanted bfloat16 or float16 or float32"):
        open_checkpoint(write(tmp_path, made.stored, FP8, dtype="float64"))


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    case, made = CASES["fp8-blocks"], CASES["fp8-blocks"].made()
    made.stored[made.scales[0]][1, 2] = torch.nan
    with opened(tmp_path, case, made.stored) as reader:
        assert torch.equal(reader.read(made.plain, slice(0, 128)), expected_of(made, case)[:128])
        with pytest.raises(ModelError, match=rf"{made.scales[0]} holds values that are no numbers; download"):
            reader.read(made.plain, slice(100, 129))


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("fp8") and "scale_inv" in CASES[name].made().scales[0]])
def test_fp8_as_transformers_dequantises_it(case: str, tmp_path: Path) -> None:
    """It reads no ragged blocks, so the stored matrix is cut to whole ones."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    made = CASES[case].made()
    block = CASES[case].options.get("block", (128, 128)) or made.expected.shape
    rows, columns = (size // step * step for size, step in zip(made.expected.shape, block))
    scale = made.stored[made.scales[0]]
    scale = scale[: rows // block[0], : columns // block[1]] if scale.ndim else scale
    dtype = getattr(torch, CASES[case].dtype)
    wanted = Fp8Dequantize(None)._dequantize_one(made.stored[made.plain][:rows, :columns], scale, dtype)
    with opened(tmp_path, CASES[case], made.stored) as reader:
        assert torch.equal(bits(reader.read(made.plain, slice(rows), slice(columns))), bits(wanted))


def test_mxfp4_as_transformers_dequantises_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made, generator = CASES["mxfp4"].made(), torch.Generator().manual_seed(1)
    blocks, scales = (made.stored[f"{made.plain}_{part}"] for part in ("blocks", "scales"))
    blocks = torch.randint(0, 256, blocks.shape, generator=generator).byte()
    scales = torch.randint(0, 255, scales.shape, generator=generator).byte()
    wanted = convert_moe_packed_tensors(blocks, scales)
    with opened(tmp_path, CASES["mxfp4"], {f"{made.plain}_blocks": blocks, f"{made.plain}_scales": scales}) as reader:
        got = reader.read(made.plain)
    assert got.shape == wanted.shape == (3, 96, 20)
    assert torch.equal(got, wanted)
    assert not bool(torch.isfinite(wanted).all()), "the largest exponents go beyond what bf16 can hold, here and there"


def test_an_index_beyond_the_groups_is_named(tmp_path: Path) -> None:
    for name in ("gptq-activation-order", "compressed-int4-shuffled"):
        case, made = CASES[name], CASES[name].made()
        index = next(part for part in made.scales if part.endswith("g_idx"))
        made.stored[index][5] = 3
        with opened(tmp_path / name, case, made.stored) as reader:
            assert torch.equal(reader.read(made.plain, columns=slice(6, 60)), expected_of(made, case)[:, 6:60])
            with pytest.raises(ModelError, match=rf"{index} names groups outside 0 to 2; download"):
                reader.read(made.plain)


REFUSED = {
    "gptq": {"bits": 3, "checkpoint_format": "marlin", "pack_dtype": "int64", "dynamic": {"+:.*": {"bits": 8}}, "group_size": 0},
    "awq": {"bits": 8, "version": "gemv", "zero_point": False, "group_size": None},
    "nf4": {"load_in_4bit": False, "bnb_4bit_quant_storage": "bfloat16"},
    "compressed-int4-groups": {"format": "nvfp4-pack-quantized", "transform_config": {"a": 1}, "sparsity_config": {"format": "sparse-24-bitmask"}},
}


@pytest.mark.parametrize(("case", "key"), [(case, key) for case, changes in REFUSED.items() for key in changes])
def test_each_setting_that_changes_the_numbers_is_refused(case: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^{tmp_path}: .*{'settings of their own' if key == 'dynamic' else key}.*; (take a|mend)") as caught:
        opened(tmp_path, CASES[case], CASES[case].made().stored, **{key: REFUSED[case][key]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 3}, r"compressed-tensors model.layers.0.mlp.down_proj weights with num_bits = 3 are not read, wanted 4 or 8"),
        ({"strategy": "token"}, "strategy = 'token' are not read, wanted tensor or channel or group or block"),
        ({"type": "float"}, "type = 'float' are not read, wanted int"),
        ({"group_size": None}, "has strategy group with group_size = None; take the model's own config.json"),
        ({"strategy": "block", "block_structure": "1x"}, "has strategy block with block_structure = '1x'"),
        ({"group_size": 16}, r"weight_scale has shape \(60, 3\), wanted \(60, 5\)"),
    ],
)
def test_a_scheme_that_is_not_read_is_refused(weights: dict[str, Any], message: str, tmp_path: Path) -> None:
    case = CASES["compressed-int4-groups"]
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, case, case.made().stored, config_groups=compressed(**weights)["config_groups"])


def test_a_module_has_the_scheme_that_names_it(tmp_path: Path) -> None:
    case, made = CASES["compressed-int4-groups"], CASES["compressed-int4-groups"].made()
    four, eight = (compressed(num_bits=bits)["config_groups"]["group_0"] for bits in (4, 8))
    for targets in ([MODULE], [r"re:.*\.down_proj$"]):
        groups = {"a": {**eight, "targets": ["Linear"]}, "b": {**four, "targets": targets}}
        with opened(tmp_path, case, made.stored, config_groups=groups) as reader:
            assert torch.equal(reader.read(made.plain), expected_of(made, case))
    for groups in ({"a": {**four, "targets": ["re:.*q_proj"]}}, {"W8A8": ["Linear"]}, None):
        with pytest.raises(ModelError, match=rf"{MODULE} is stored quantised, but no entry of config_groups is about it"):
            opened(tmp_path, case, made.stored, config_groups=groups)


def test_how_older_files_say_it(tmp_path: Path) -> None:
    case, made = CASES["nf4"], CASES["nf4"].made()
    unnamed = {key: value for key, value in case.settings.items() if key != "quant_method"}
    with open_checkpoint(write(tmp_path / "nf4", made.stored, unnamed)) as reader:
        assert torch.equal(reader.read(made.plain), expected_of(made, case))
    case, made = CASES["compressed-fp8-blocks"], CASES["compressed-fp8-blocks"].made()
    scheme = case.settings["config_groups"]["group_0"]["weights"]
    groups = {"group_0": {"targets": ["Linear"], "weights": {**scheme, "block_structure": "16x32"}}}
    with opened(tmp_path / "fp8", case, made.stored, config_groups=groups) as reader:
        assert torch.equal(reader.read(made.plain), expected_of(made, case))
