"""The rows of a command as tokens: read, made here or made before, and dealt out in batches or packs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mswift.commands.session import reading
from mswift.config import ExportConfig, SftConfig
from mswift.config.sections import DataSection
from mswift.errors import ConfigError, DataError
from mswift.log import get_logger, is_main_process, progress_bar

if TYPE_CHECKING:
    from mswift.commands.session import Session
    from mswift.data import TokenRows
    from mswift.data.batches import Batches
    from mswift.data.encoded import TokenSink
    from mswift.data.mixing import Mixture
    from mswift.data.packing import PackIndex
    from mswift.data.rows import Row
    from mswift.templates import RowEncoder

logger = get_logger(__name__)


def read_rows(config: SftConfig | ExportConfig) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows to evaluate on; empty where there are none.

    Raises:
        DataError: a source cannot be read, or has too many bad rows.
    """
    from mswift.data import load_dataset, split

    data = config.data
    pairs = isinstance(config, ExportConfig) and config.export.template_mode == "rlhf"
    common = {**reading(config), "seed": data.data_seed, "want": "preference" if pairs else "answer"}
    rows = load_dataset(data.dataset, shuffle=data.dataset_shuffle, **common) if data.dataset else []
    if data.val_dataset:
        return rows, load_dataset(data.val_dataset, shuffle=False, **common)
    return split(rows, data.split_dataset_ratio, data.data_seed)


def model_limit(directory: Path) -> int | None:
    """The longest sequence that a model was made for, in tokens."""
    limit = json.loads((directory / "config.json").read_text(encoding="utf8")).get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def encode(
    config: SftConfig,
    template: RowEncoder,
    train_rows: list[Row],
    eval_rows: list[Row],
    output_dir: Path,
    directory: Path,
    *,
    sink: TokenSink | None = None,
) -> tuple[TokenRows, TokenRows | None]:
    """Tokens to train on and to evaluate on: rows that are encoded now, then those of cached data sets.

    Args:
        sink: what takes the training rows that are encoded now; None: memory.

    Raises:
        DataError: no row is left, or a cached data set is not of this tokenizer, template and length.
    """
    from mswift.data import encode_dataset

    with progress_bar("tokenising") as progress:
        settings = _settings(config.data, directory) | {"progress": progress}
        report_dir = output_dir if is_main_process() else None
        train = [encode_dataset(train_rows, template, report_dir=report_dir, sink=sink, **settings)] if train_rows else []
        evaluation = [encode_dataset(eval_rows, template, **settings)] if eval_rows else []
    train += _cached(config, template, config.packing.cached_dataset, "train", settings["max_length"])
    evaluation += _cached(config, template, config.packing.cached_val_dataset, "val", settings["max_length"])
    return _joined(train), _joined(evaluation) if evaluation else None


def encode_evaluation(config: SftConfig, template: RowEncoder, rows: list[Row], directory: Path) -> TokenRows | None:
    """Rows to evaluate on as tokens, where there are any. Raises `DataError` where none of them is left."""
    from mswift.data import encode_dataset

    if not rows:
        return None
    return encode_dataset(rows, template, **_settings(config.data, directory))


def _settings(data: DataSection, directory: Path) -> dict[str, Any]:
    """What `encode_dataset` is told of the flags."""
    return {
        "max_length": data.max_length or model_limit(directory),
        "truncation": data.truncation_strategy,
        "num_proc": data.dataset_num_proc,
        "strict": data.strict,
        "max_bad_share": data.max_bad_rows_ratio,
    }


def _joined(data: list[TokenRows]) -> TokenRows:
    from mswift.data.encoded import join

    return join(data, data[0].report)


def _cached(config: SftConfig, template: RowEncoder, names: list[str], part: str, limit: int | None) -> list[TokenRows]:
    from mswift.data.cache import check_cached, find_cached, load_cached

    for name in names:
        check_cached(find_cached(name, part)[0], template.identity(), limit)
    return [load_cached(names, part=part, seed=config.data.data_seed, shuffle=config.data.dataset_shuffle)] if names else []


def make_batches(
    config: SftConfig,
    session: Session,
    data: TokenRows,
    template: RowEncoder,
    *,
    hidden_size: int,
    evaluation: bool = False,
    mixture: Mixture | None = None,
) -> Batches:
    """The micro batches of this rank.

    Args:
        mixture: which rows an epoch has; None: every one once.

    Raises:
        DataError: a row is longer than a pack.
    """
    from mswift.data.batches import Batches

    layout = session.groups.layout
    tokenizer = template.tokenizer
    packs = _packs(config, data, session.directory, evaluation=evaluation) if config.packing.packing else None
    batches = Batches(
        data,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.resolve_global_batch_size(layout.dp),
        seed=config.data.data_seed,
        shuffle=config.data.dataset_shuffle and not evaluation,
        dp_rank=session.groups.coords.dp,
        dp_size=layout.dp,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
        pad_to_multiple=layout.tp if config.parallel.sequence_parallel else 1,
        padding_free=config.packing.padding_free,
        packs=packs,
        mixture=mixture,
        linear_cost=12 * hidden_size,
    )
    if packs is not None and is_main_process():
        waste = packs.waste(packs.of_epoch(0))
        logger.info("packing: %d rows in %d packs of %d tokens, %.2f %% empty", len(data), batches.num_units, packs.capacity, 100 * waste)
    return batches


def _packs(config: SftConfig, data: TokenRows, directory: Path, *, evaluation: bool) -> PackIndex:
    from mswift.data.cache import find_cached
    from mswift.data.packing import PackIndex

    names = config.packing.cached_val_dataset if evaluation else config.packing.cached_dataset
    capacity = config.packing.packing_length or config.data.max_length or model_limit(directory)
    if capacity is None:
        raise ConfigError("--packing needs --packing_length or --max_length: the model's config names no limit of its own")
    return PackIndex(
        data.lengths,
        capacity,
        seed=config.data.data_seed,
        shuffle=config.data.dataset_shuffle and not evaluation,
        strategy=config.packing.packing_strategy,
        folder=find_cached(names[0], "val" if evaluation else "train")[0] if names else None,
    )


def write_cached(config: ExportConfig, template: RowEncoder, directory: Path, target: Path) -> str:
    """Write ``--dataset`` as tokens into ``target/train``, and rows to evaluate on into ``target/val``; returns what was written, for people.

    Raises:
        DataError: no row is left, or the disk is full. Nothing is left behind.
    """
    from mswift.data.cache import CacheSink
    from mswift.data.sources import source_files

    data, mode = config.data, config.export.template_mode
    said = []
    for part, rows in zip(("train", "val"), read_rows(config), strict=True):
        if not rows:
            continue
        names = data.val_dataset if part == "val" and data.val_dataset else data.dataset
        sink = CacheSink(target / part, template.identity(), source_files(names, use_hf=config.model.use_hf), mode)
        try:
            with progress_bar(f"tokenising {part}") as progress:
                made, count = _write(rows, template, {"progress": progress, "sink": sink, **_settings(data, directory)}, pairs=mode == "rlhf")
        except (DataError, KeyboardInterrupt):
            sink.remove()
            raise
        logger.info("%s: %s", part, ", ".join(made.report.lines()))
        said.append(f"{count}, {made.num_tokens} tokens in {target / part}")
    return "; ".join(said)


def _write(rows: list[Row], template: RowEncoder, settings: dict[str, Any], *, pairs: bool) -> tuple[TokenRows, str]:
    """The rows as tokens in the sink of the settings, and how many there are."""
    from mswift.data import encode_dataset
    from mswift.data.pairs import encode_pairs

    if pairs:
        made = encode_pairs(rows, template, **settings)
        return made.data, f"{len(made)} preference rows"
    data = encode_dataset(rows, template, **settings)
    return data, f"{len(data)} rows"
