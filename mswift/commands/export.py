"""``mswift export``: a model or an adapter in another form: merged, as a Hugging Face directory, as a Megatron checkpoint."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mswift.commands import session as sessions
from mswift.commands.beside import beside_export
from mswift.commands.dry_run import dry_run
from mswift.commands.session import Session, check_data, check_writable, find_adapter, find_model, load_model, make_template, open_session
from mswift.commands.tokens import write_cached
from mswift.config import ExportConfig
from mswift.conversion.directories import is_megatron, is_megatron_adapter
from mswift.errors import ConfigError
from mswift.log import get_logger, is_main_process, progress_bar
from mswift.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from mswift.engines.megatron_model import MegatronModel

logger = get_logger(__name__)


def check(config: ExportConfig, world: int) -> None:
    """Find what can be found without torch, before any of the `world` processes is started; writes nothing.

    Raises:
        MswiftError: model, layout, adapter or target are missing, damaged or do not fit.
    """
    if config.export.dry_run:
        world = ParallelLayout.smallest(**config.parallel.sizes()).world
    sessions.check(config, world)
    if config.export.to_cached_dataset:
        check_data(config)
    _target(config, find_adapter(config.export.adapters))


def export(config: ExportConfig) -> None:
    """Write what the flags ask for, from all processes; then say what it cost and what to do next.

    Raises:
        MswiftError: nothing to do, a model or adapter that cannot be read, or a target that exists.
    """
    settings = config.export
    adapter = find_adapter(settings.adapters)
    target = _target(config, adapter)
    directory = find_model(config.model)
    if settings.to_cached_dataset:
        check_data(config)
        if is_main_process():
            template = make_template(directory, config.model, config.template)
            logger.info(write_cached(config, template, directory, target))
            if settings.template_mode == "rlhf":
                print(f"preference rows, of which both answers stay together, are in {target}")
            else:
                print(f"train on it: mswift sft --model {config.model.model} --cached_dataset {target}")
        return
    if settings.dry_run:
        if is_main_process():
            dry_run(config, directory)
        return
    with open_session(directory, config.parallel, config.runtime) as session:
        import transformers.models.auto  # noqa: F401  (seconds of libraries that are no part of the conversion)

        import mswift.engines.megatron_model  # noqa: F401

        begun = time.perf_counter()
        model = load_model(session, config.model, config.parallel, deferred=True, further=True)
        if adapter is not None:
            model.load_adapter(adapter)
        beside_export(config, model, adapter)
        if settings.to_mcore:
            done = _write_megatron(config, model, target, begun)
        elif settings.to_peft_format or (adapter is not None and not settings.merge_lora):
            done = _write_adapter(config, model, target)
        else:
            done = _write_model(config, model, target, begun)
        done += f"; at most {_peak(session) / 2**30:.2f} GiB of memory in one process: {target}"
    if is_main_process():
        logger.info(done)
        print(_next(config, adapter, target))


def _write_megatron(config: ExportConfig, model: MegatronModel, target: Path, begun: float) -> str:
    from mswift.engines.megatron_checkpoint import write_adapter, write_checkpoint

    settings = config.export
    with progress_bar("writing the Megatron checkpoint") as progress:
        if model.lora is not None:
            write_adapter(model, target, base_model=config.model.model, exist_ok=settings.exist_ok)
            return f"Megatron adapter written, {model.adapter_coverage}"
        report = write_checkpoint(
            model, target, resume=settings.resume, exist_ok=settings.exist_ok, max_shard_size=settings.max_shard_size, progress=progress
        )
    return f"{report.tensors} tensors, {_rate(report.bytes, time.perf_counter() - begun)} in {report.files} file(s){_reused(report.reused)}"


def _write_adapter(config: ExportConfig, model: MegatronModel, target: Path) -> str:
    from mswift.engines.megatron_checkpoint import read_adapter

    settings = config.export
    if settings.mcore_adapter is not None:
        read_adapter(model, Path(settings.mcore_adapter).expanduser())
    model.export_adapter(target, base_model=config.model.model, form=settings.expert_lora_format, exist_ok=settings.exist_ok)
    return f"PEFT adapter written, {model.adapter_coverage}"


def _write_model(config: ExportConfig, model: MegatronModel, target: Path, begun: float) -> str:
    settings = config.export
    with progress_bar("writing the model") as progress:
        report = model.export_merged(
            target, max_shard_size=settings.max_shard_size, exist_ok=settings.exist_ok, keep=True, resume=settings.resume, progress=progress
        )
    return f"{report.tensors} tensors, {_rate(report.bytes, time.perf_counter() - begun)} in {report.files} file(s){_reused(report.reused)}"


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / 2**20:,.0f} MiB in {seconds:.1f} s ({nbytes / 1e9 / max(seconds, 1e-9):.2f} GB/s)"


def _reused(count: int) -> str:
    return f", {count} of them finished before" if count else ""


def _peak(session: Session) -> int:
    """The most memory that a process has held, in bytes. Collective."""
    import torch
    import torch.distributed as dist

    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=session.runtime.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def _next(config: ExportConfig, adapter: Path | None, target: Path) -> str:
    settings = config.export
    alone = settings.to_peft_format or (adapter is not None and not settings.merge_lora)
    if alone and settings.to_mcore:
        return f"back to PEFT: mswift export --model {config.model.model} --mcore_adapter {target} --to_peft_format true"
    return f"talk to it: mswift infer {'--adapters' if alone else '--model'} {target}"


def _target(config: ExportConfig, adapter: Path | None) -> Path:
    """Where to write: ``--output_dir``, else beside what is exported.

    Raises:
        ConfigError: there is nothing to convert, or the target cannot be written. ConversionError: it is something else's.
    """
    from mswift.conversion.staging import check_target

    settings = config.export
    converts = settings.to_cached_dataset or settings.to_mcore or settings.to_hf or settings.to_peft_format
    if adapter is None and settings.output_dir is None and not converts:
        raise ConfigError(
            "nothing to export: give --adapters DIR (with --merge_lora true for a whole model), or --output_dir to write the model again"
        )
    if settings.mcore_adapter is not None and not is_megatron_adapter(Path(settings.mcore_adapter).expanduser()):
        raise ConfigError(f"--mcore_adapter {settings.mcore_adapter} is not a Megatron adapter; give what --adapters DIR --to_mcore true has written")
    model = Path(config.model.model).expanduser()
    if settings.to_mcore and is_megatron(model):
        raise ConfigError(f"--model {model} is a Megatron checkpoint already; every layout reads it, so leave --to_mcore out")
    source = adapter or (Path(settings.mcore_adapter) if settings.mcore_adapter else model)
    target = Path(settings.output_dir).expanduser() if settings.output_dir else source.with_name(f"{source.name}-{_kind(config, adapter)}")
    if target.exists() and not settings.exist_ok and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output_dir {target} exists already; give another folder, or --exist_ok true to replace it")
    if not settings.to_cached_dataset or not _is_cached(target):
        check_target(target, settings.exist_ok)
    check_writable(target.parent, "--output_dir")
    return target


def _is_cached(target: Path) -> bool:
    """Whether a folder holds what --to_cached_dataset has written, and nothing else."""
    from mswift.data.cache import MANIFEST

    entries = list(target.iterdir()) if target.is_dir() else []
    return bool(entries) and all(entry.name in ("train", "val") and (entry / MANIFEST).is_file() for entry in entries)


def _kind(config: ExportConfig, adapter: Path | None) -> str:
    settings = config.export
    if settings.to_mcore:
        return "mcore"
    if settings.to_hf and adapter is None:
        return "hf"
    return "peft" if settings.to_peft_format or (adapter is not None and not settings.merge_lora) else "merged"
