"""Settings of a run: typed sections, read from flags, YAML and the names that ms-swift has used."""

from __future__ import annotations

from mswift.config.configs import Config, DataConfig, ExportConfig, InferConfig, PtConfig, SftConfig, VerifyConfig, warnings_for
from mswift.config.parse import CONFIGS, Parsed, parse_command, read_command
from mswift.config.sections import (
    DataSection,
    ExportSection,
    GenerationSection,
    InferSection,
    InspectSection,
    LoggingSection,
    ModelSection,
    OptimSection,
    PackingSection,
    ParallelSection,
    QuantSection,
    RuntimeSection,
    SaveSection,
    TemplateSection,
    TrainSection,
    TunerSection,
    VerifySection,
)
from mswift.config.table import Row, format_table, table_rows

__all__ = [
    "CONFIGS",
    "Config",
    "DataConfig",
    "DataSection",
    "ExportConfig",
    "ExportSection",
    "GenerationSection",
    "InferConfig",
    "InferSection",
    "InspectSection",
    "LoggingSection",
    "ModelSection",
    "OptimSection",
    "PackingSection",
    "ParallelSection",
    "Parsed",
    "PtConfig",
    "QuantSection",
    "Row",
    "RuntimeSection",
    "SaveSection",
    "SftConfig",
    "TemplateSection",
    "TrainSection",
    "TunerSection",
    "VerifyConfig",
    "VerifySection",
    "format_table",
    "parse_command",
    "read_command",
    "table_rows",
    "warnings_for",
]
