"""Checkpoints with quantised weights, read as if they held plain ones: one layer between the files and all that asks for tensors.

A quantised weight shows itself under the name, in the shape and in the dtype that it has in a plain checkpoint; the tensors that it is made
of are hidden. Of each, only what a slice needs is read, and it is dequantised some rows at a time, in fp32, and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mswift.conversion.directories import CONFIG_FILE, is_pickled, listing, read_json
from mswift.conversion.formats import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from mswift.conversion.formats.base import Quantised, Span
from mswift.conversion.formats.settings import QUANTIZATION_KEY, dtype_of, excluded_modules, quantisation_of
from mswift.conversion.in_turn import Advice
from mswift.conversion.inner_reader import InnerReader
from mswift.conversion.pickles import PickleReader
from mswift.conversion.rules import Shape
from mswift.conversion.safetensors_io import CheckpointReader, TensorReader, TensorSpec
from mswift.errors import ModelError

Finder = Callable[[CheckpointReader, Mapping[str, Any]], Iterator[Quantised]]
_FORMATS: dict[str, tuple[Finder, str]] = {
    "awq": (awq.find, awq.AUXILIARY),
    "bitsandbytes": (bitsandbytes.find, bitsandbytes.AUXILIARY),
    "compressed-tensors": (compressed_tensors.find, compressed_tensors.AUXILIARY),
    "fp8": (fp8.find, fp8.AUXILIARY),
    "gptq": (gptq.find, gptq.AUXILIARY),
    "mxfp4": (mxfp4.find, mxfp4.AUXILIARY),
}
"""For each method: what finds the quantised weights, and the names that only a part of one can have."""
_ACTIVATIONS = re.compile(r"\.(input|output|activation|k|v|q)_(scale|zero_point|global_scale)$|\.weight_format$")
"""Tensors that say how to quantise activations and caches, which are not quantised here."""
_RAW = {torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu}
_CHUNK = 2**21  # elements that are dequantised at a time: some tens of MiB of fp32 and indices


def open_checkpoint(directory: str | Path) -> TensorReader:
    """The tensors of a model directory, plain however they are stored; those of a text part under the names that it has alone.

    Raises:
        ModelError: the directory is damaged, quantised in a way that is not read, or its weights and scales do not belong together.
    """
    stored = PickleReader(directory) if is_pickled(Path(directory)) else CheckpointReader(directory)
    try:
        config = read_json(stored.directory / CONFIG_FILE)
        settings = quantisation_of(config, str(stored.directory))
        if settings is not None:
            return _bare(QuantisedReader(stored, settings, getattr(torch, dtype_of(config, str(stored.directory)))))
        raw = [name for name in stored.names if stored.dtype(name) in fp8.FP8]
        if raw:
            raise ModelError(
                f"{stored.directory}: {listing('tensor', raw)} of fp8, but config.json has no {QUANTIZATION_KEY} to say how they are scaled; "
                "take the model's own config.json, or a plain checkpoint"
            )
        return _bare(stored)
    except BaseException:
        stored.close()
        raise


def _bare(reader: TensorReader) -> TensorReader:
    return InnerReader(reader) if InnerReader.fits(reader.names) else reader


class QuantisedReader(TensorReader):
    """A quantised checkpoint as plain tensors.

    Args:
        stored: its files; closed with the reader. settings: its ``quantization_config``. dtype: of the dequantised weights.

    Raises:
        ModelError: a weight without its scale, a scale without its weight, a weight that the settings say is plain, settings that are not read.
    """

    def __init__(self, stored: CheckpointReader, settings: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.directory, self._stored, self._dtype = stored.directory, stored, dtype
        find, auxiliary = _FORMATS[settings["quant_method"]]
        self._weights = {weight.name: weight for weight in find(stored, settings)}
        hidden = {part for weight in self._weights.values() for part in weight.parts}
        hidden |= {name for name in stored.names if _ACTIVATIONS.search(name)}
        plain = [name for name in stored.names if name not in hidden]
        self._check(plain, settings, re.compile(auxiliary))
        anchors = {weight.parts[0]: weight.name for weight in self._weights.values()}
        self._names = [anchors.get(name, name) for name in stored.names if name in anchors or name not in hidden]

    def _check(self, plain: list[str], settings: Mapping[str, Any], auxiliary: re.Pattern[str]) -> None:
        lonely = [name for name in plain if auxiliary.search(name)]
        if lonely:
            raise ModelError(f"{self.directory}: {listing('scale', lonely)} without a quantised weight; download or quantise the model again")
        raw = [name for name in plain if self._stored.dtype(name) in _RAW]
        if raw:
            method = settings["quant_method"]
            raise ModelError(f"{self.directory}: {listing('tensor', raw)} of integers or fp8 that {method} does not explain; take another checkpoint")
        twice = [name for name in plain if name in self._weights]
        if twice:
            raise ModelError(f"{self.directory}: {listing('weight', twice)} both plain and quantised; download or quantise the model again")
        excluded = excluded_modules(settings, [name.removesuffix(".weight") for name in self._weights])
        if excluded:
            raise ModelError(
                f"{self.directory}: {listing('module', excluded)} quantised although {QUANTIZATION_KEY} says not; mend config.json, or take another "
                "checkpoint"
            )

    @property
    def names(self) -> list[str]:
        """All plain tensors, in the order of the files; a quantised one where the first of its parts is."""
        return list(self._names)

    def spec(self, name: str) -> TensorSpec:
        weight = self._weights.get(name)
        return self._stored.spec(name) if weight is None else TensorSpec(self._dtype, weight.shape)

    def read_into(self, name: str, out: torch.Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        weight = self._weights.get(name)
        if weight is None:
            self._stored.read_into(name, out, rows, columns)
            return
        shape = weight.shape
        assert out.dtype == self._dtype, f"{name} is {self._dtype}, its destination {out.dtype}"
        (top, bottom, _), (left, right, _) = ((part or slice(None)).indices(size) for part, size in zip((rows, columns), shape))
        for height, width in _windows((top, bottom), (left, right), shape, weight.rows_first):
            values = weight.read(self._stored, height, width)
            out[height[0] - top : height[1] - top, width[0] - left : width[1] - left].copy_(values)

    def advise(self, name: str, rows: slice | None, advice: Advice) -> None:
        if name not in self._weights:
            self._stored.advise(name, rows, advice)

    def close(self) -> None:
        self._stored.close()


def _windows(rows: Span, columns: Span, shape: Shape, rows_first: bool) -> Iterator[tuple[Span, Span]]:
    """A part of a tensor in pieces of at most about `_CHUNK` elements, cut first along the dim in which its bytes lie apart."""
    depth = torch.Size(shape[2:]).numel()
    lengths = [rows[1] - rows[0], columns[1] - columns[0]]
    whole, cut = (1, 0) if rows_first else (0, 1)
    steps = [0, 0]
    steps[whole] = max(1, min(lengths[whole], _CHUNK // depth))
    steps[cut] = max(1, _CHUNK // (depth * steps[whole]))
    for top in range(*rows, steps[0]):
        for left in range(*columns, steps[1]):
            yield (top, min(top + steps[0], rows[1])), (left, min(left + steps[1], columns[1]))
