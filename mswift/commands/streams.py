"""``--streaming true``: rows that every process reads for itself while it trains."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mswift.log import get_logger

if TYPE_CHECKING:
    from mswift.commands.session import Session
    from mswift.config import SftConfig
    from mswift.data.loading import ReadSettings
    from mswift.data.stream_batches import StreamBatches
    from mswift.templates import RowEncoder

logger = get_logger(__name__)


def open_stream(config: SftConfig, session: Session, template: RowEncoder, reading: ReadSettings, *, limit: int | None) -> StreamBatches:
    """This rank's micro batches of every step, after one look at all files, which the processes share. Collective.

    Args:
        limit: tokens that a row may have.

    Raises:
        DataError: a file cannot be read, or the mixture is empty.
    """
    from mswift.data.mixing import quotas, shares_of
    from mswift.data.registry import resolve
    from mswift.data.shards import open_shards
    from mswift.data.stream_batches import BatchShape, StreamBatches
    from mswift.data.stream_workers import Origin
    from mswift.data.streaming import make_plan

    data, layout, tokenizer = config.data, session.groups.layout, template.tokenizer
    entries = [resolve(text, use_hf=config.model.use_hf) for text in data.dataset]
    ranks: dict[str, Any] = _ranks()
    sources = [[open_shards(replace(part, entry=i), **ranks) for part in parts] for i, (_, parts) in enumerate(entries)]
    specs = [spec for spec, _ in entries]
    sizes = [spec.count or sum(one.num_rows for one in shards) for spec, shards in zip(specs, sources, strict=True)]
    shares = shares_of([spec.weight for spec in specs], data.shares())
    plan = make_plan(
        sources,
        quotas(sizes, shares, data.stopping_strategy),
        global_batch_size=config.train.resolve_global_batch_size(layout.dp),
        buffer_size=data.shuffle_buffer_size,
        seed=data.data_seed,
        shuffle=data.dataset_shuffle,
        by_share=shares is not None,
    )
    shape = BatchShape(
        config.train.micro_batch_size,
        session.groups.coords.dp,
        layout.dp,
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
        layout.tp if config.parallel.sequence_parallel else 1,
        config.packing.padding_free,
    )
    origin = Origin(data.dataset, data.external_plugins, data.custom_dataset_info, config.model.use_hf)
    return StreamBatches(
        plan,
        template,
        reading,
        shape,
        max_length=limit,
        truncation=data.truncation_strategy,
        workers=config.train.dataloader_num_workers,
        origin=origin,
    )


def _ranks() -> dict[str, Any]:
    """How `open_shards` shares the files among all processes."""
    import torch.distributed as dist

    world = dist.get_world_size()

    def exchange(found: Any) -> list[Any]:
        everything: list[Any] = [None] * world
        dist.all_gather_object(everything, found)
        return everything

    return {"exchange": exchange, "rank": dist.get_rank(), "world": world}


def lines(stream: StreamBatches, names: list[str]) -> list[str]:
    """What is read, for people: a line for each source."""
    plan = stream.plan
    return [
        f"{name}: streamed, {source.num_rows:,} rows in {sum(len(one.names) for one in source.shards)} files, {source.quota:,} in an epoch "
        f"({source.quota / plan.rows_per_epoch:.1%})"
        for name, source in zip(names, plan.sources, strict=True)
    ]


def positions(stream: StreamBatches, names: list[str], step: int) -> dict[str, int]:
    """Rows taken of each source before `step`, for the checkpoint."""
    return {f"{i + 1}: {name}": taken for i, (name, taken) in enumerate(zip(names, stream.plan.positions(step), strict=True))}
