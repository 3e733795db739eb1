"""Rows from files and hubs, encoded once, handed out as micro batches by the number of the step.

`mswift.data.batches` is not imported here: it is the one module of this room that needs torch.
"""

from __future__ import annotations

from mswift.data.dataset import load_dataset, split
from mswift.data.encoded import EncodedDataset, TokenRows
from mswift.data.encoding import encode_dataset
from mswift.data.registry import register_dataset
from mswift.data.report import LengthReport
from mswift.data.rows import Row, normalise
from mswift.data.sources import RawRow, SourceSpec, check_sources, parse_spec, read_source

__all__ = [
    "EncodedDataset",
    "LengthReport",
    "RawRow",
    "Row",
    "SourceSpec",
    "TokenRows",
    "check_sources",
    "encode_dataset",
    "load_dataset",
    "normalise",
    "parse_spec",
    "read_source",
    "register_dataset",
    "split",
]
