"""``mswift sft``: a checkpoint and rows of conversations to a fine-tuned model."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mswift.commands import session as sessions
from mswift.commands.beside import beside_training
from mswift.commands.session import (
    Session,
    check_data,
    check_writable,
    find_adapter,
    find_model,
    load_model,
    make_encoder,
    open_session,
    shared,
)
from mswift.commands.training_data import TrainingData, open_data, read_training
from mswift.config import SftConfig, format_table
from mswift.errors import CheckpointError, ConfigError, one_line
from mswift.log import get_logger, is_main_process

if TYPE_CHECKING:
    from mswift.data.batches import StepSource
    from mswift.engines.megatron import MegatronEngine
    from mswift.engines.megatron_model import MegatronModel
    from mswift.train.folders import RunIdentity
    from mswift.train.state import Callback, TrainState

logger = get_logger(__name__)
REPORT_NAME = "dropped_rows.txt"
_LEFT_BY_A_RUN = ("args.json", "logging.jsonl", "loss.png", "runs", "merged", REPORT_NAME)


def check(config: SftConfig, world: int) -> None:
    """Find what can be found without torch, before any of the `world` processes is started; writes nothing.

    Raises:
        MswiftError: model, layout, data files, adapter, output folder or checkpoint are missing, damaged or do not fit.
    """
    from mswift.conversion.hub import local_model

    sessions.check(config, world)
    resume_from = _check_files(config, config.output_dir())
    directory = local_model(config.model.model)
    if directory is not None:
        _check_resume(config, resume_from, directory)


def sft(config: SftConfig) -> None:
    """Fine-tune, save, and say what to do next. Runs on every process.

    Raises:
        MswiftError: anything that the user can put right, before a file is written wherever that can be known.
    """
    started = time.perf_counter()
    output_dir = config.output_dir()
    resume_from = _check_files(config, output_dir)
    directory = find_model(config.model)
    _check_resume(config, resume_from, directory)
    rows = read_training(config)
    with open_session(directory, config.parallel, config.runtime) as session:
        output_dir = shared(output_dir)  # --add_version names it by each rank's own clock
        template = make_encoder(directory, config)
        data = open_data(config, session, template, rows, output_dir)
        engine = _make_engine(config, session, data_seed=config.train.seed)
        engine.model.beside = beside_training(config, directory, template)
        hidden_size = engine.config.hidden_size
        batches, eval_batches = data.batches(config, session, template, hidden_size=hidden_size)
        identity = _identity(config, engine, directory, data, batches.global_batch_size)
        start = _resume(engine, resume_from, identity)
        counts = engine.parameter_counts()  # all ranks count; one speaks
        adapted = engine.model.adapter_coverage if engine.model.lora is not None else ""
        _prepare_output(config, output_dir, keep_report=data.report.num_dropped > 0)
        if is_main_process():
            _announce(config, engine, counts, adapted, data, output_dir)
        _train(config, engine, batches, eval_batches, identity, data, output_dir, start, started)
        if config.save.merge_lora and config.tuner.tuner_type == "lora":
            engine.model.export_merged(output_dir / "merged", max_shard_size=config.save.max_shard_size, exist_ok=True)
    if is_main_process():
        _say_what_next(config, output_dir)


def _check_files(config: SftConfig, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, or None, after a look at everything else on disk that the run needs.

    Raises:
        MswiftError: a data file, an adapter or a checkpoint is missing or damaged, or the output folder cannot be used.
    """
    from mswift.data.cache import find_cached, read_manifest

    check_data(config)
    for part, names in (("train", config.packing.cached_dataset), ("val", config.packing.cached_val_dataset)):
        for name in names:
            read_manifest(find_cached(name, part)[0])
    find_adapter(config.tuner.adapters)
    return _check_output(config, output_dir)


def _check_output(config: SftConfig, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, or None; refuses a folder that holds another run.

    Raises:
        ConfigError: the folder holds another run, is a file, or cannot be written to. CheckpointError: no such checkpoint, or a damaged one.
    """
    from mswift.train.folders import find_checkpoint, list_checkpoints

    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir {output_dir} is a file; give a folder")
    resume_from = find_checkpoint(config.save.resume_from_checkpoint, output_dir)
    if resume_from is None and not config.save.overwrite_output_dir and config.save.resume_from_checkpoint is None:
        found = [path.name for path in list_checkpoints(output_dir)] + [name for name in _LEFT_BY_A_RUN[:2] if (output_dir / name).exists()]
        if found:
            raise ConfigError(
                f"--output_dir {output_dir} holds another run ({', '.join(found[:3])}); give another folder, "
                "--resume_from_checkpoint auto to go on with it, or --overwrite_output_dir true to replace it"
            )
    check_writable(output_dir, "--output_dir")
    return resume_from


def _check_resume(config: SftConfig, resume_from: Path | None, directory: Path) -> None:
    from mswift.train.folders import check_base, check_flags

    if resume_from is not None:
        check_flags(resume_from, config.to_flat())
        check_base(resume_from, directory)


def _make_engine(config: SftConfig, session: Session, *, data_seed: int) -> MegatronEngine:
    from mswift.engines.megatron import MegatronEngine, OptimizerSettings
    from mswift.tuners.lora import LoraSettings
    from mswift.tuners.targets import resolve_targets

    tuner, train, optim = config.tuner, config.train, config.optim
    recompute: dict[str, Any] = {} if train.recompute_granularity == "none" else {"recompute_granularity": train.recompute_granularity}
    if train.recompute_granularity == "full":
        recompute |= {"recompute_method": train.recompute_method, "recompute_num_layers": train.recompute_num_layers}
    if train.mtp_num_layers is not None:
        recompute["mtp_loss_scaling_factor"] = train.mtp_loss_scaling_factor
    quantised = config.quant.quant_bits is not None
    model = load_model(session, config.model, config.parallel, deferred=quantised, further=train.mtp_num_layers is not None, **recompute)
    found = model.description.built_further
    if train.mtp_num_layers not in (None, found):
        raise ConfigError(f"--mtp_num_layers is {train.mtp_num_layers}, but {session.directory} has {found} of them; give that number, or none")
    adapter = find_adapter(tuner.adapters)
    if adapter is not None:
        model.load_adapter(adapter, dropout=tuner.lora_dropout)
    elif tuner.tuner_type == "lora":
        model.add_lora(
            LoraSettings(
                rank=tuner.lora_rank,
                alpha=tuner.lora_alpha,
                dropout=tuner.lora_dropout,
                use_rslora=tuner.use_rslora,
                use_dora=tuner.use_dora,
                targets=resolve_targets(tuner.target_modules, model.linear_names, use_dora=tuner.use_dora),
                seed=train.seed,
            )
        )
    if quantised:
        _quantise(config, model)
    settings = OptimizerSettings(
        learning_rate=config.learning_rate,
        weight_decay=optim.weight_decay,
        beta1=optim.adam_beta1,
        beta2=optim.adam_beta2,
        epsilon=optim.adam_epsilon,
        max_grad_norm=optim.max_grad_norm,
        use_distributed_optimizer=bool(optim.use_distributed_optimizer),
    )
    return MegatronEngine(model, settings, seed=train.seed, source=config.model.model)


def _quantise(config: SftConfig, model: MegatronModel) -> None:
    """Keep the layers under the adapter in few bits.

    Raises:
        ConfigError: products are to be computed in another dtype than the model's.
    """
    from mswift.log import progress_bar
    from mswift.tuners.quantised import QuantSettings

    quant = config.quant
    assert quant.quant_bits is not None
    if quant.bnb_4bit_compute_dtype not in (None, _name(model.dtype)):
        raise ConfigError(f"--bnb_4bit_compute_dtype {quant.bnb_4bit_compute_dtype}: the model is in {_name(model.dtype)}; say it with --torch_dtype")
    with progress_bar("quantising the model") as progress:
        model.quantise(QuantSettings(quant.quant_bits, quant.bnb_4bit_use_double_quant), progress)


def _identity(config: SftConfig, engine: MegatronEngine, directory: Path, data: TrainingData, global_batch_size: int) -> RunIdentity:
    from mswift.train.folders import RunIdentity, fingerprint_model

    return RunIdentity(
        model=fingerprint_model(directory),
        trained=engine.trained_fingerprint(),
        data=data.fingerprint() + _order_of_packs(config),
        global_batch_size=global_batch_size,
        seed=config.data.data_seed,
    )


def _resume(engine: MegatronEngine, resume_from: Path | None, identity: RunIdentity) -> int:
    if resume_from is None:
        return 0
    from mswift.train.checkpoint import resume

    step = resume(engine, resume_from, identity)
    logger.info("resumed from %s: %d steps are done", resume_from, step)
    return step


def _announce(
    config: SftConfig,
    engine: MegatronEngine,
    counts: tuple[int, int],
    adapted: str,
    data: TrainingData,
    output_dir: Path,
) -> None:
    """The table, once; what was made of the data and the model in a line each."""
    from mswift.kernels import choice

    trained, total = counts
    model = engine.model
    print(format_table(config), flush=True)
    logger.info("model: %s, %s, %s of %s parameters trained", model.family.name, _name(model.dtype), f"{trained:,}", f"{total:,}")
    if adapted:
        logger.info("model: %s", adapted)
    if model.quantised:
        logger.info("model: %s", model.quantised_memory)
    logger.info("layout: %s on %s", engine.groups.layout.describe(), engine.device.type)
    if model.padded_heads:
        logger.info("layout: %s", model.padded_heads)
    logger.info("kernels: %s", choice.announcement(engine.device.type))
    for line in data.said:
        logger.info("%s", line)
    if data.report.num_dropped:
        logger.warning("%s; see %s", ", ".join(data.report.lines()), output_dir / REPORT_NAME)
    if data.evaluation is not None and data.evaluation.report.num_dropped:
        logger.warning("validation: %s", ", ".join(data.evaluation.report.lines()))


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _order_of_packs(config: SftConfig) -> str:
    """What else the rows of a step depend on."""
    packing = config.packing
    return f"; packs of {packing.packing_length or config.data.max_length}, {packing.packing_strategy}" if packing.packing else ""


def _prepare_output(config: SftConfig, output_dir: Path, *, keep_report: bool) -> None:
    """The output folder with args.json and, with --overwrite_output_dir, without what an earlier run left. All ranks call it.

    Raises:
        CheckpointError: on every rank if the main process cannot write there.
    """
    from mswift.parallel.agree import agree, attempt

    def write() -> None:
        if config.save.overwrite_output_dir:
            _remove_old_run(output_dir, keep=REPORT_NAME if keep_report else "")
        for path in output_dir.glob(".checkpoint-*.incomplete"):  # of a run that was killed while it saved
            shutil.rmtree(path)
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_args(config, output_dir)

    try:
        agree(attempt(write) if is_main_process() else None, f"writing to --output_dir {output_dir}")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give another folder, or mend that") from error


def _write_args(config: SftConfig, directory: Path) -> None:
    from mswift.conversion.staging import replace_file

    replace_file(directory / "args.json", json.dumps(config.to_flat(), indent=2, ensure_ascii=False) + "\n")


def _remove_old_run(output_dir: Path, *, keep: str) -> None:
    for path in [*output_dir.glob("checkpoint-*"), *(output_dir / name for name in _LEFT_BY_A_RUN if name != keep)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _callbacks(config: SftConfig, output_dir: Path) -> list[Callback]:
    from mswift.train.callbacks import JsonLinesCallback, PlotCallback, ProgressCallback, TensorBoardCallback

    callbacks: list[Callback] = [ProgressCallback(), JsonLinesCallback(output_dir)]
    if "tensorboard" in config.logging.report_to:
        callbacks.append(TensorBoardCallback(output_dir))
    return [*callbacks, PlotCallback(output_dir)] if config.logging.plot else callbacks


def _train(
    config: SftConfig,
    engine: MegatronEngine,
    batches: StepSource,
    eval_batches: StepSource | None,
    identity: RunIdentity,
    data: TrainingData,
    output_dir: Path,
    start: int,
    started: float,
) -> None:
    from mswift.objectives.sft import SupervisedObjective
    from mswift.train.checkpoint import CheckpointWriter
    from mswift.train.loop import LoopSettings, TrainLoop
    from mswift.train.schedule import LearningRate
    from mswift.train.state import TrainState

    optim = config.optim
    total = config.train.max_steps or max(1, round(batches.steps_per_epoch * config.train.num_train_epochs))
    warmup = optim.warmup_steps or round(optim.warmup_ratio * total)
    schedule = LearningRate(config.learning_rate, total, warmup, optim.min_lr, optim.lr_scheduler_type)
    writer = CheckpointWriter(engine, identity, _model_writer(config, engine), keep=config.save.save_total_limit, notes=data.notes)

    def save(state: TrainState) -> Path:
        return writer.save(output_dir, state.step)

    settings = LoopSettings(
        total_steps=total,
        logging_steps=config.logging.logging_steps,
        eval_steps=config.eval_steps,
        save_steps=config.save.save_steps,
        log_first_step=config.logging.logging_first_step,
    )
    state = TrainState(output_dir, total, batches.steps_per_epoch, step=start)
    loop = TrainLoop(
        engine, SupervisedObjective(), batches, schedule, settings, eval_batches=eval_batches, save=save, callbacks=_callbacks(config, output_dir)
    )
    ready = time.perf_counter() - started
    if start < total:
        logger.info("training: %d steps of %d rows; ready after %.1f s", total, batches.global_batch_size, ready)
    else:
        logger.info("nothing to train: checkpoint-%d has all %d steps; more come with a larger --max_steps or --num_train_epochs", start, total)
    try:
        loop.run(state)
        data.finish()
    except OSError as error:  # the files of the log; those of a checkpoint have an error of their own
        raise CheckpointError(
            f"cannot write to {output_dir}: {one_line(error)}; free some space, then go on with --resume_from_checkpoint auto"
        ) from error


def _model_writer(config: SftConfig, engine: MegatronEngine) -> Callable[[Path], None]:
    """Writes into a checkpoint what other programs load: the PEFT adapter, or the whole model when it is trained."""

    def write(directory: Path) -> None:
        if config.tuner.tuner_type == "lora":
            engine.export_adapter(directory)
        else:
            engine.export_merged(directory, max_shard_size=config.save.max_shard_size)
        if is_main_process():
            _write_args(config, directory)

    return write


def _say_what_next(config: SftConfig, output_dir: Path) -> None:
    from mswift.train.folders import list_checkpoints

    newest = list_checkpoints(output_dir)[-1]
    lora = config.tuner.tuner_type == "lora"
    print(f"\ndone: {'adapter' if lora else 'model'} in {newest}")
    if config.logging.plot:
        print(f"curves: {output_dir / 'loss.png'}; figures: {output_dir / 'logging.jsonl'}")
    if config.save.merge_lora and lora:
        print(f"merged model: {output_dir / 'merged'}")
    print(f"talk to it: mswift infer {'--adapters' if lora else '--model'} {newest}")
    if lora and not config.save.merge_lora:
        print(f"merge it:   mswift export --adapters {newest} --merge_lora true --output_dir {output_dir / 'merged'}")
