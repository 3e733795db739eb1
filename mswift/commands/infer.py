"""``mswift infer``: talk to a model, or answer the rows of a file."""

from __future__ import annotations

import dataclasses
import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mswift.commands import session as sessions
from mswift.commands.session import Session, check_data, find_adapter, find_model, load_model, make_template, open_session, reading
from mswift.config import InferConfig
from mswift.errors import ConfigError
from mswift.log import get_logger, is_main_process, progress_bar

if TYPE_CHECKING:
    from mswift.data.rows import Row
    from mswift.rollout.answers import Answers, Gather
    from mswift.rollout.generate import Generator
    from mswift.rollout.prompts import PromptEncoder, Question
    from mswift.rollout.settings import GenerationSettings
    from mswift.templates.chat import ChatTemplate

logger = get_logger(__name__)


def check(config: InferConfig, world: int) -> None:
    """Find what can be found without torch, before any of the `world` processes is started; writes nothing.

    Raises:
        MswiftError: model, layout, adapter or data files are missing, damaged or do not fit.
    """
    sessions.check(config, world)
    adapter = find_adapter(config.infer.adapters)
    if config.data.val_dataset:
        check_data(config)
        _result_path(config, adapter)


def infer(config: InferConfig) -> None:
    """Answer the rows of ``--val_dataset``, or without any what the user writes. Runs on every process.

    Raises:
        MswiftError: anything that the user can put right, before a file is written wherever that can be known.
    """
    adapter = find_adapter(config.infer.adapters)
    rows = _read_rows(config)
    result_path = _result_path(config, adapter) if rows is not None else None
    directory = find_model(config.model)
    with open_session(directory, config.parallel, config.runtime) as session:
        _check_replicas(session, conversation=rows is None)
        template = make_template(directory, config.model, config.template, adapter)
        settings, encoder = _settings(config, template, directory)
        questions = None if rows is None else _questions(config, rows, encoder, settings, directory)
        generator = _make_generator(config, session, template, adapter)
        if is_main_process():
            _announce(generator, settings, adapter)
        if questions is None or result_path is None:
            _converse(config, session, generator, encoder, settings)
        else:
            _answer(config, session, generator, encoder, questions, settings, result_path)


def _read_rows(config: InferConfig) -> list[Row] | None:
    from mswift.data.dataset import sample
    from mswift.data.loading import ReadSettings, load_sources

    data = config.data
    if not data.val_dataset:
        return None
    check_data(config)
    known = reading(config)
    sources = load_sources(data.val_dataset, ReadSettings(**{**known, "columns": known["columns"] or {}}, want="prompt"))
    for source in sources:
        logger.info("%s", source.line)
    return [row for source in sources for row in sample(source.rows, source.spec.count, None)]


def _result_path(config: InferConfig, adapter: Path | None) -> Path:
    """Where the answers go: ``--result_path``, else infer_result/<time>.jsonl in the folder of the adapter or the model (of a hub: in this one).

    Raises:
        ConfigError: there is such a file, or it cannot be made.
    """
    if config.infer.result_path:
        path = Path(config.infer.result_path).expanduser()
    else:
        model = Path(config.model.model).expanduser()
        folder = adapter or (model if model.is_dir() else Path())
        path = folder / "infer_result" / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    if path.exists():
        raise ConfigError(f"--result_path {path} exists already; remove it or give another file")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--result_path {path}: {parent} {'cannot be written to' if parent.is_dir() else 'is a file'}; give another place")
    return path


def _check_replicas(session: Session, *, conversation: bool) -> None:
    layout = session.groups.layout
    if conversation and layout.independent_copies > 1:
        raise ConfigError(
            f"a conversation needs one copy of the model, got {layout.dp}: {layout.describe()}; "
            f"use --tensor_model_parallel_size {layout.tp * layout.dp}, or one process"
        )


def _settings(config: InferConfig, template: ChatTemplate, directory: Path) -> tuple[GenerationSettings, PromptEncoder]:
    from mswift.rollout.prompts import PromptEncoder
    from mswift.rollout.settings import resolve_settings

    generation = dataclasses.replace(config.generation, stop_words=[*config.generation.stop_words, *template.stop_words])
    settings, notes = resolve_settings(generation, directory, template.stop_token_ids)
    if config.parallel.sequence_parallel:
        notes.append("--sequence_parallel has no effect: an answer is computed token by token")
    if config.generation.stream and config.data.val_dataset:
        notes.append("--stream has no effect: the answers to --val_dataset go to a file")
    if is_main_process():
        for note in notes:
            logger.warning(note)
    return settings, PromptEncoder(template, config.template.response_prefix or "")


def _questions(config: InferConfig, rows: list[Row], encoder: PromptEncoder, settings: GenerationSettings, directory: Path) -> list[Question]:
    from mswift.families.model import read_hf_config
    from mswift.rollout.prompts import make_questions

    own = read_hf_config(directory, trust_remote_code=config.model.trust_remote_code).max_position_embeddings
    longest = min(own, config.data.max_length or own)
    cut_to = longest - min(settings.max_new_tokens, longest // 2) if config.data.truncation_strategy == "left" else None
    return make_questions(rows, encoder, max_length=longest, cut_to=cut_to)


def _make_generator(config: InferConfig, session: Session, template: ChatTemplate, adapter: Path | None) -> Generator:
    from mswift.rollout.generate import Generator

    model_section = dataclasses.replace(config.model, torch_dtype=_dtype(config, session))
    parallel = dataclasses.replace(config.parallel, sequence_parallel=False)
    model = load_model(session, model_section, parallel)
    if adapter is not None:
        model.load_adapter(adapter)
    return Generator(model, template.tokenizer, max_length=config.data.max_length)


def _dtype(config: InferConfig, session: Session) -> Any:
    """``--torch_dtype``; but float32 for bf16 where the processor only stores that and there is memory for it.

    Such a processor computes bf16 products in fp32 anyway. To make every answer's every token wait until all weights are widened again would
    take most of the time, so they are held wide.
    """
    import psutil

    from mswift.conversion.quantised import open_checkpoint
    from mswift.runtime.precision import cpu_multiplies_bf16

    if session.runtime.is_cuda or cpu_multiplies_bf16():
        return config.model.torch_dtype
    with open_checkpoint(session.directory) as reader:
        plain = reader.nbytes
    needed = 2 * plain * session.groups.layout.dp
    return "float32" if needed < psutil.virtual_memory().available else config.model.torch_dtype


def _announce(generator: Generator, settings: GenerationSettings, adapter: Path | None) -> None:
    model = generator.model
    where = f"{str(model.dtype).removeprefix('torch.')} on {model.runtime.device.type}, {model.groups.layout.describe()}"
    logger.info("model: %s, %s%s", model.family.name, where, "" if adapter is None else f", adapter {adapter}")
    logger.info("answers: %s", settings.describe())


def _converse(config: InferConfig, session: Session, generator: Generator, encoder: PromptEncoder, settings: GenerationSettings) -> None:
    import torch.distributed as dist

    from mswift.rollout.console import Console
    from mswift.rollout.conversation import Conversation, converse

    world = session.groups.layout.world
    group = _patient_group(list(range(world)))

    def share(line: str | None) -> str | None:
        box = [line]
        dist.broadcast_object_list(box, src=0, group=group)
        return box[0]

    console = Console(is_main=is_main_process(), share=share if world > 1 else None)
    conversation = Conversation(generator, encoder, settings, seed=config.generation.seed)
    converse(conversation, console, stream=config.generation.stream is not False)


def _answer(
    config: InferConfig,
    session: Session,
    generator: Generator,
    encoder: PromptEncoder,
    questions: list[Question],
    settings: GenerationSettings,
    result_path: Path,
) -> None:
    from mswift.rollout.answers import Replica, ResultFile, answer_rows

    copies = session.groups.layout.independent_copies
    replica = Replica(session.groups.coords.dp if copies > 1 else 0, copies, _gather(session, copies))
    result = ResultFile(result_path) if is_main_process() else None
    figures = "the rest was not answered"
    try:
        with progress_bar("answering") as progress:
            done = answer_rows(
                generator,
                questions,
                settings,
                result,
                batch_size=config.infer.max_batch_size,
                seed=config.generation.seed,
                prefix=config.template.response_prefix or "",
                parse=encoder.template.parse,
                replica=replica,
                progress=progress,
            )
        figures = f"{done.num_tokens:,} tokens in {done.seconds:.1f} s, {done.tokens_per_second:,.1f} tokens/s"
    finally:
        if result is not None:
            result.close()
        if result is not None and result.num_lines:
            print(f"{result.num_lines} of {len(questions)} answers in {result_path}; {figures}", flush=True)


def _gather(session: Session, copies: int) -> Gather:
    """Brings the answers of all replicas to rank 0, from the first rank of each."""
    import torch.distributed as dist

    from mswift.parallel.layout import RankCoords

    layout, rank = session.groups.layout, session.groups.rank
    leaders = [layout.rank_of(RankCoords(tp=0, cp=0, dp=dp, pp=0)) for dp in range(copies)]
    group = _patient_group(leaders)

    def gather(answers: Answers) -> list[Answers] | None:
        if rank not in leaders:
            return None
        box: list[Any] | None = [None] * len(leaders) if rank == 0 else None
        dist.gather_object(answers, box, dst=0, group=group)
        return box

    return gather


def _patient_group(ranks: list[int]) -> Any:
    """A group for what is not a tensor, in which one process may wait for the user or for a slower one as long as it takes."""
    import torch.distributed as dist

    return dist.new_group(ranks, backend="gloo", timeout=datetime.timedelta(days=30))
