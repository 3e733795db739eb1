"""``mswift export``: an adapter merged into its model, or written again, as a directory that other programs load."""

from __future__ import annotations

from pathlib import Path

from mswift.commands import session as sessions
from mswift.commands.session import check_writable, find_adapter, find_model, load_model, open_session
from mswift.config import ExportConfig
from mswift.errors import ConfigError
from mswift.log import get_logger, is_main_process, progress_bar

logger = get_logger(__name__)


def check(config: ExportConfig, world: int) -> None:
    """Find what can be found without torch, before any of the `world` processes is started; writes nothing.

    Raises:
        MswiftError: model, layout, adapter or target are missing, damaged or do not fit.
    """
    sessions.check(config, world)
    _target(config, find_adapter(config.export.adapters))


def export(config: ExportConfig) -> None:
    """Write the model (adapters merged with ``--merge_lora true``), or the adapter alone, from all processes; then say what to do next.

    Raises:
        MswiftError: nothing to do, a model or adapter that cannot be read, or a target that exists.
    """
    settings = config.export
    adapter = find_adapter(settings.adapters)
    target = _target(config, adapter)
    directory = find_model(config.model)
    with open_session(directory, config.parallel, config.runtime) as session:
        model = load_model(session, config.model, config.parallel)
        if adapter is not None:
            model.load_adapter(adapter)
        if adapter is not None and not settings.merge_lora:
            model.export_adapter(target, base_model=config.model.model, exist_ok=settings.exist_ok)
            done = f"adapter written to {target}"
        else:
            with progress_bar("writing the model") as progress:
                report = model.export_merged(target, max_shard_size=settings.max_shard_size, exist_ok=settings.exist_ok, progress=progress)
            size, rate = report.bytes / 2**20, report.bytes / 2**30 / max(report.seconds, 1e-9)
            done = f"{report.tensors} tensors, {size:,.0f} MiB in {report.files} file(s), {report.seconds:.1f} s, {rate:.2f} GiB/s: {target}"
    if is_main_process():
        logger.info(done)
        flag = "--adapters" if adapter is not None and not settings.merge_lora else "--model"
        print(f"talk to it: mswift infer {flag} {target}")


def _target(config: ExportConfig, adapter: Path | None) -> Path:
    """Where to write: ``--output_dir``, else beside what is exported.

    Raises:
        ConfigError: without an adapter there is nothing to convert, or the target cannot be written. ConversionError: it is something else's.
    """
    from mswift.conversion.staging import check_target

    settings = config.export
    if adapter is None and settings.output_dir is None:
        raise ConfigError(
            "nothing to export: give --adapters DIR (with --merge_lora true for a whole model), or --output_dir to write the model again"
        )
    kind = "merged" if adapter is None or settings.merge_lora else "peft"
    source = adapter if adapter is not None else Path(config.model.model)
    target = Path(settings.output_dir).expanduser() if settings.output_dir else source.with_name(f"{source.name}-{kind}")
    if target.exists() and not settings.exist_ok and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output_dir {target} exists already; give another folder, or --exist_ok true to replace it")
    check_target(target, settings.exist_ok)
    check_writable(target.parent, "--output_dir")
    return target
