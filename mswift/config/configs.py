"""A run's settings: sections composed into one value per command, checked as a whole, flat on disk and on the command line."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from mswift.config.fields import Flag, flags_of, nearest
from mswift.config.sections import (
    DEFAULT_GLOBAL_BATCH_SIZE,
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
from mswift.config.splits import parse_stages
from mswift.errors import ConfigError

TOLD_BESIDE = ("template", "agent_template", "system", "response_prefix", "enable_thinking", "max_length")
"""Settings that are written beside a model or an adapter, and that ``mswift infer`` takes up again."""
_LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "merge_lora")


class Config:
    """What `SftConfig`, `InferConfig` and `ExportConfig` have in common: flat names, checks, warnings."""

    __slots__ = ()
    verb: ClassVar[str]
    model: ModelSection
    parallel: ParallelSection
    runtime: RuntimeSection

    @classmethod
    def sections(cls) -> dict[str, type]:
        """Section name -> section class, in order."""
        return _sections(cls)  # type: ignore[arg-type]  # mypy takes a class for unhashable when its instances are

    @classmethod
    def flags(cls) -> dict[str, Flag]:
        """Flag name -> flag, over all sections, in order."""
        return _flags(cls)  # type: ignore[arg-type]

    def to_flat(self, *, secrets: bool = False) -> dict[str, Any]:
        """Flag name -> value, of JSON types only; `from_flat` reads it back.

        Args:
            secrets: keep tokens; without it they are None, so that the result may be written to a file.
        """
        nested: dict[str, dict[str, Any]] = dataclasses.asdict(self)  # type: ignore[call-overload]
        flat = {name: value for section in nested.values() for name, value in section.items()}
        return {name: None if flag.secret and not secrets else flat[name] for name, flag in self.flags().items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any], source: str = "") -> Self:
        """The config with these values and defaults elsewhere; types and ranges are checked, combinations (`check`) are not.

        Args:
            source: what an error calls the mapping, such as ``out/args.json``.

        Raises:
            ConfigError: a name is unknown, or a value has the wrong type or is out of range.
        """
        prefix = f"{source}: " if source else ""
        flags = cls.flags()
        values: dict[str, dict[str, Any]] = {name: {} for name in cls.sections()}
        for name, raw in flat.items():
            if name not in flags:
                near = nearest(name, list(flags))
                raise ConfigError(f"{prefix}{name} is not a setting of mswift {cls.verb}{f'; did you mean {near}?' if near else ''}")
            values[flags[name].section][name] = flags[name].read(raw, f"{prefix}{name}")
        return cls(**{name: section(**values[name]) for name, section in cls.sections().items()})

    def changed(self) -> set[str]:
        """Names of the flags whose value is not the default."""
        flat = self.to_flat(secrets=True)
        return {name for name, flag in self.flags().items() if flat[name] != flag.default}

    def check(self) -> None:
        """Raise if a value, or a combination of values, is wrong.

        Raises:
            ConfigError: the first fault that is found, in one line.
        """
        flags = self.flags()
        for name, value in self.to_flat(secrets=True).items():
            flags[name].read(value, f"--{name}")
        for fault in self.faults():
            raise ConfigError(fault)

    def faults(self) -> Iterator[str]:
        """One line for each combination of settings that cannot run."""
        yield from ()

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Flags that have no effect beside the others, with the reason."""
        yield from ()

    def effective(self) -> dict[str, Any]:
        """Flags whose value follows from others while they are not set, with that value, for people to read."""
        return {}


@functools.cache
def _sections(config_class: type) -> dict[str, type]:
    hints = typing.get_type_hints(config_class)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(config_class)}


@functools.cache
def _flags(config_class: type) -> dict[str, Flag]:
    return {flag.name: flag for name, section in _sections(config_class).items() for flag in flags_of(section, name)}


def warnings_for(config: Config) -> list[str]:
    """One line for each flag that was changed from its default and has no effect in this run."""
    changed = config.changed()
    return [f"--{name} has no effect: {reason}" for names, reason in config.idle() for name in names if name in changed]


def _model_faults(model: ModelSection) -> Iterator[str]:
    if not model.model:
        yield "--model is required: give a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or the directory of a checkpoint"


def _common_faults(model: ModelSection, parallel: ParallelSection) -> Iterator[str]:
    yield from _model_faults(model)
    yield from _split_faults(parallel)


def _split_faults(parallel: ParallelSection) -> Iterator[str]:
    """Flags of uneven stages that exclude each other, or a layout string that is none."""
    given = {
        "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout is not None,
        "decoder_first_pipeline_num_layers": parallel.decoder_first_pipeline_num_layers is not None,
        "decoder_last_pipeline_num_layers": parallel.decoder_last_pipeline_num_layers is not None,
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
    }
    names = list(given)
    ways = [name for name in (_first(given, names[:1]), _first(given, names[1:3]), _first(given, names[3:])) if name]
    if len(ways) > 1:
        yield f"--{ways[0]} and --{ways[1]} each say how layers are divided into stages; give one of them"
    if parallel.pipeline_model_parallel_layout is not None:
        try:
            parse_stages(parallel.pipeline_model_parallel_layout)
        except ConfigError as error:
            yield str(error)
    elif ways and parallel.pipeline_model_parallel_size == 1:
        yield f"--{ways[0]} needs --pipeline_model_parallel_size of at least 2; there is one stage"


def _first(given: Mapping[str, bool], names: list[str]) -> str | None:
    return next((name for name in names if given[name]), None)


def _idle_parallel(parallel: ParallelSection) -> Iterator[tuple[tuple[str, ...], str]]:
    if parallel.tensor_model_parallel_size == 1:
        yield ("sequence_parallel",), "it needs --tensor_model_parallel_size of at least 2"


@dataclass(kw_only=True, slots=True)
class SftConfig(Config):
    """Settings of ``mswift sft``."""

    verb: ClassVar[str] = "sft"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    packing: PackingSection = field(default_factory=PackingSection)
    template: TemplateSection = field(default_factory=TemplateSection)
    tuner: TunerSection = field(default_factory=TunerSection)
    quant: QuantSection = field(default_factory=QuantSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    save: SaveSection = field(default_factory=SaveSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)

    @property
    def learning_rate(self) -> float:
        """The highest learning rate, with the default of the tuner filled in."""
        if self.optim.learning_rate is not None:
            return self.optim.learning_rate
        return 1e-4 if self.tuner.tuner_type == "lora" else 1e-5

    @property
    def eval_steps(self) -> int:
        return self.logging.eval_steps or self.save.save_steps

    @property
    def has_evaluation(self) -> bool:
        return bool(self.data.val_dataset or self.packing.cached_val_dataset) or self.data.split_dataset_ratio > 0

    def output_dir(self, now: datetime.datetime | None = None) -> Path:
        """The folder of the run: ``--output_dir`` or ``output/<model name>``, and in it ``v0-<date>`` with ``--add_version``.

        Args:
            now: time that names the version; several processes have to agree on it.
        """
        folder = Path(self.save.output_dir or f"output/{Path(self.model.model.rstrip('/')).name}").expanduser()
        return folder / f"v0-{now or datetime.datetime.now():%Y%m%d-%H%M%S}" if self.save.add_version else folder

    def effective(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "eval_steps": self.eval_steps,
            "output_dir": str(self.output_dir()),
            "global_batch_size": "micro x accumulation x data parallel" if self.train.gradient_accumulation_steps else DEFAULT_GLOBAL_BATCH_SIZE,
        }

    def faults(self) -> Iterator[str]:
        yield from _common_faults(self.model, self.parallel)
        if not self.data.dataset and not self.packing.cached_dataset:
            yield "--dataset is required: give one or more files, folders or hub ids"
        yield from self._packing_faults()
        yield from self._data_faults()
        yield from self._quant_faults()
        if self.tuner.adapters and self.tuner.tuner_type == "full":
            yield "--adapters needs --tuner_type lora; to train every weight, merge the adapter first (mswift merge-lora)"
        if len(self.tuner.adapters) > 1:
            yield f"--adapters: got {len(self.tuner.adapters)} adapters, wanted one to go on training"
        if not self.tuner.target_modules and self.tuner.tuner_type == "lora":
            yield "--target_modules is empty, wanted all-linear or names of layers"
        if self.optim.min_lr > self.learning_rate:
            yield f"--min_lr {self.optim.min_lr:g} is above the learning rate {self.learning_rate:g}; make it smaller"
        if self.save.overwrite_output_dir and self.save.resume_from_checkpoint is not None:
            yield "--overwrite_output_dir starts anew and --resume_from_checkpoint goes on; give one of them"

    def _packing_faults(self) -> Iterator[str]:
        packing, limit = self.packing, self.data.max_length
        if (packing.packing or packing.padding_free) and self.parallel.context_parallel_size > 1:
            flag = "--packing" if packing.packing else "--padding_free"
            yield f"{flag} does not go with --context_parallel_size {self.parallel.context_parallel_size} yet; leave one of them out"
        if packing.packing and packing.packing_length is not None and limit is not None and packing.packing_length < limit:
            yield f"--packing_length {packing.packing_length} is less than --max_length {limit}; raise it, or lower --max_length"
        if self.data.split_dataset_ratio > 0 and not self.data.dataset:
            yield "--split_dataset_ratio holds out rows of --dataset, and there is none; give --cached_val_dataset"

    def _quant_faults(self) -> Iterator[str]:
        quant, bits = self.quant, self.quant.quant_bits
        if (quant.quant_method is None) != (bits is None):
            given, missing = ("quant_method", "quant_bits 4 or 8") if bits is None else ("quant_bits", "quant_method bnb")
            yield f"--{given} needs --{missing} beside it"
        if bits not in (None, 4, 8):
            yield f"--quant_bits: got {bits}, wanted 4 (nf4) or 8 (int8)"
        if bits is None:
            return
        if self.tuner.tuner_type == "full":
            yield f"--quant_bits {bits} is for frozen weights, and --tuner_type full trains them all; make it lora"
        if self.tuner.use_dora:
            yield f"--quant_bits {bits} does not go with --use_dora true, which needs the norms of plain weights; leave one of them out"
        if self.model.torch_dtype is not None and quant.bnb_4bit_compute_dtype not in (None, self.model.torch_dtype):
            yield (
                f"--bnb_4bit_compute_dtype {quant.bnb_4bit_compute_dtype} differs from --torch_dtype {self.model.torch_dtype}; "
                "products are computed in the dtype of the model, so give one of the two"
            )

    def _data_faults(self) -> Iterator[str]:
        shares, entries = self.data.shares(), len(self.data.dataset)
        if shares and len(shares) != entries:
            yield f"--interleave_prob has {len(shares)} numbers for {entries} entries of --dataset, wanted one for each"
        if shares and self.packing.cached_dataset:
            yield "--interleave_prob does not go with --cached_dataset; leave one of them out"
        if self.data.streaming and (self.packing.packing or self.packing.cached_dataset):
            flag = "--packing" if self.packing.packing else "--cached_dataset"
            yield f"--streaming true does not go with {flag}, which knows all rows before; make them with mswift export --to_cached_dataset true"
        if self.data.streaming and self.data.split_dataset_ratio > 0:
            yield "--streaming true does not go with --split_dataset_ratio, which needs all rows; give rows to evaluate on as --val_dataset"

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from _idle_parallel(self.parallel)
        if not self.packing.packing:
            yield ("packing_length", "packing_strategy"), "it needs --packing true"
        if not self.data.interleave_prob and not any("@" in entry for entry in self.data.dataset):
            yield ("stopping_strategy",), "it needs --interleave_prob, or weights (@) in --dataset"
        if not self.data.streaming:
            yield ("shuffle_buffer_size", "dataloader_num_workers"), "it needs --streaming true"
        elif not self.data.val_dataset:
            yield ("dataset_num_proc",), "with --streaming every process reads its own rows while it trains"
        yield ("response_prefix",), "it is for infer"
        if self.tuner.tuner_type == "full":
            yield _LORA_FLAGS, "--tuner_type is full"
        if self.quant.quant_bits is None:
            yield ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"), "it needs --quant_bits 4"
        if self.train.recompute_granularity != "full":
            yield ("recompute_method", "recompute_num_layers"), "it needs --recompute_granularity full"
        if self.train.mtp_num_layers is None:
            yield ("mtp_loss_scaling_factor",), "it needs --mtp_num_layers"
        if self.train.max_steps is not None:
            yield ("num_train_epochs",), "--max_steps wins"
        if self.optim.warmup_steps:
            yield ("warmup_ratio",), "--warmup_steps wins"
        if self.optim.lr_scheduler_type == "constant":
            yield ("min_lr",), "--lr_scheduler_type is constant"
        if self.data.val_dataset:
            yield ("split_dataset_ratio",), "--val_dataset is the evaluation set"
        if not self.has_evaluation:
            yield ("eval_steps",), "there is no evaluation set; give --val_dataset or --split_dataset_ratio"


@dataclass(kw_only=True, slots=True)
class PtConfig(SftConfig):
    """Settings of ``mswift pt``: those of ``mswift sft``, for rows of plain text in which every token is trained."""

    verb: ClassVar[str] = "pt"

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from SftConfig.idle(self)
        names = ("template", "agent_template", "system", "loss_scale", "enable_thinking", "add_non_thinking_prefix", "disable_ignore_empty_think")
        yield names, "plain text has no turns"


@dataclass(kw_only=True, slots=True)
class InferConfig(Config):
    """Settings of ``mswift infer``: the rows to answer are ``data.val_dataset``; without any it is a conversation."""

    verb: ClassVar[str] = "infer"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    template: TemplateSection = field(default_factory=TemplateSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    generation: GenerationSection = field(default_factory=GenerationSection)
    infer: InferSection = field(default_factory=InferSection)

    def faults(self) -> Iterator[str]:
        yield from _common_faults(self.model, self.parallel)
        if self.parallel.context_parallel_size > 1:
            yield f"--context_parallel_size is {self.parallel.context_parallel_size}, wanted 1: new tokens come one at a time"

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from _idle_parallel(self.parallel)
        yield ("dataset", "split_dataset_ratio", "interleave_prob", "stopping_strategy"), "infer answers the rows of --val_dataset"
        yield ("streaming", "shuffle_buffer_size"), "infer reads all rows first"
        yield ("loss_scale", "add_non_thinking_prefix", "disable_ignore_empty_think"), "nothing is trained"
        if not self.data.val_dataset:
            yield (
                ("result_path", "max_batch_size", "columns", "disable_auto_column_mapping", "strict", "max_bad_rows_ratio", "dataset_num_proc"),
                "there is no --val_dataset",
            )
        if self.generation.temperature == 0:
            yield ("top_p", "top_k", "seed"), "--temperature is 0"


@dataclass(kw_only=True, slots=True)
class ExportConfig(Config):
    """Settings of ``mswift export`` and ``mswift merge-lora``."""

    verb: ClassVar[str] = "export"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    template: TemplateSection = field(default_factory=TemplateSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    export: ExportSection = field(default_factory=ExportSection)

    def faults(self) -> Iterator[str]:
        yield from _common_faults(self.model, self.parallel)
        settings = self.export
        if settings.merge_lora and not settings.adapters:
            yield "--adapters is required to merge: give the folder of a PEFT adapter"
        forms = [f"--{name}" for name in ("to_mcore", "to_hf", "to_peft_format") if getattr(settings, name)]
        if len(forms) > 1:
            yield f"{' and '.join(forms)} were given, wanted one form to write"
        if settings.to_cached_dataset:
            if forms or settings.merge_lora or settings.adapters:
                yield "--to_cached_dataset writes data, no model; leave out --merge_lora, --adapters and the forms of a model"
            if not self.data.dataset:
                yield "--to_cached_dataset needs --dataset: one or more files, folders or hub ids"
            if settings.output_dir is None:
                yield "--to_cached_dataset needs --output_dir, the folder that --cached_dataset will name"
            if settings.template_mode == "rlhf" and self.data.truncation_strategy == "split":
                yield "--template_mode rlhf does not go with --truncation_strategy split; take delete, left or right"
        if settings.to_peft_format and not settings.mcore_adapter:
            yield "--to_peft_format needs --mcore_adapter, the Megatron adapter to write; a PEFT adapter is in that form already"
        if settings.mcore_adapter and not settings.to_peft_format:
            yield "--mcore_adapter is only written in PEFT's form: add --to_peft_format true"
        if settings.dry_run and not settings.to_mcore:
            yield "--dry_run is for --to_mcore; another form is written as the files of the source are"
        if settings.to_mcore and settings.merge_lora:
            yield "--to_mcore with --merge_lora takes two steps: merge first, then --model MERGED --to_mcore true"
        if settings.to_hf and settings.adapters and not settings.merge_lora:
            yield "--to_hf with --adapters needs --merge_lora true; without --to_hf the adapter alone is written"

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from _idle_parallel(self.parallel)
        if not self.export.to_cached_dataset:
            names = (name for name, flag in self.flags().items() if flag.section in ("data", "template") and name not in TOLD_BESIDE)
            yield ("template_mode", *names), "it is read by --to_cached_dataset only"


@dataclass(kw_only=True, slots=True)
class VerifyConfig(Config):
    """Settings of ``mswift verify``."""

    verb: ClassVar[str] = "verify"
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    verify: VerifySection = field(default_factory=VerifySection)

    def faults(self) -> Iterator[str]:
        yield from _common_faults(self.model, self.parallel)
        if not self.verify.against:
            yield "--against is required: give the directory of the other model"

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        return _idle_parallel(self.parallel)


@dataclass(kw_only=True, slots=True)
class DataConfig(Config):
    """Settings of ``mswift data``."""

    verb: ClassVar[str] = "data"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    template: TemplateSection = field(default_factory=TemplateSection)
    inspect: InspectSection = field(default_factory=InspectSection)

    def faults(self) -> Iterator[str]:
        yield from _model_faults(self.model)
        if not self.data.dataset:
            yield "--dataset is required: give one or more files, folders or hub ids"
        if self.inspect.html and self.inspect.json:
            yield "--html and --json were given, wanted one of them"

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        mixing = ("interleave_prob", "stopping_strategy", "streaming", "shuffle_buffer_size")
        yield ("val_dataset", "split_dataset_ratio", "dataset_shuffle", "data_seed", *mixing), "data shows the first rows of --dataset"
        yield ("dataset_num_proc",), "a few rows are shown"
        yield ("response_prefix",), "it is for infer"
