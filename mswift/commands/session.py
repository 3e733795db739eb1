"""What every command does first: find the model, choose the device, join the processes, read the tokenizer."""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mswift.config import Config, DataConfig, ExportConfig, InferConfig, ModelSection, ParallelSection, RuntimeSection, SftConfig, TemplateSection
from mswift.conversion.directories import ADAPTER_CONFIG_FILE, check_tokenizer, is_megatron, read_adapter_config, read_json
from mswift.errors import ConfigError, ModelError, one_line
from mswift.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from mswift.engines.megatron_model import MegatronModel
    from mswift.parallel.groups import Groups
    from mswift.runtime.device import Runtime
    from mswift.templates import RowEncoder
    from mswift.templates.chat import ChatTemplate

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """The processes of one command, joined.

    Args:
        directory: the model on this machine. runtime, groups: device and place of this process.
    """

    directory: Path
    runtime: Runtime
    groups: Groups


def check(config: Config, world: int) -> None:
    """Find what is wrong with a model on this machine, or with its layout over `world` processes, before any of them is started.

    Needs no torch. A model that has yet to be downloaded is left to `find_model`.

    Raises:
        ModelError, ConfigError, LayoutError: with what to change.
    """
    from mswift.conversion.hub import local_model

    if isinstance(config, SftConfig | InferConfig | ExportConfig):
        check_template(config.template)
    directory = local_model(config.model.model)
    layout = ParallelLayout(world=world, **config.parallel.sizes())
    if directory is not None:
        sizes = check_model(directory, config.model)
        if not isinstance(config, ExportConfig):
            check_tokenizer(directory)
        if all(isinstance(size, int) for size in sizes.values()):
            layout.check_model(**sizes)


def find_model(model: ModelSection, *, weights: bool = True) -> Path:
    """The local directory of ``--model``, checked for what a checkpoint needs before anything heavy starts; without `weights` only a tokenizer.

    Raises:
        ModelError: no such model, or a file is missing or damaged. ConfigError: its dtype cannot be held.
    """
    from mswift.conversion.hub import resolve_model

    directory = resolve_model(
        model.model,
        use_hf=model.use_hf,
        revision=model.model_revision,
        token=model.hub_token,
        trust_remote_code=model.trust_remote_code,
        weights=weights,
    )
    if weights:
        check_model(directory, model)
    return directory


def check_model(directory: Path, model: ModelSection) -> dict[str, Any]:
    """Read the headers and the config of a checkpoint; returns the sizes that a layout has to divide, as the config has them.

    Raises:
        ModelError: a file is missing or damaged, the architecture or the way it is quantised is not supported. ConfigError: its dtype cannot be held.
    """
    from mswift.conversion.directories import CONFIG_FILE, check_weights
    from mswift.conversion.formats.settings import quantisation_of
    from mswift.families import choose_dtype, find_family, text_config

    if not is_megatron(directory):
        check_weights(directory)
    config = text_config(read_json(directory / CONFIG_FILE), str(directory))
    quantisation_of(config, str(directory))
    find_family(config.get("architectures"), str(directory))
    choose_dtype(model.torch_dtype, config.get("dtype") or config.get("torch_dtype"), str(directory))
    return {"num_layers": config.get("num_hidden_layers"), "ffn_size": config.get("intermediate_size")}


def find_adapter(adapters: Sequence[str]) -> Path | None:
    """The PEFT directory of ``--adapters``: the given one, or the newest checkpoint of a run folder. Needs no torch.

    Raises:
        ConfigError: several adapters. ModelError: no adapter there, or a damaged one.
    """
    from mswift.train.folders import list_checkpoints

    if not adapters:
        return None
    if len(adapters) > 1:
        raise ConfigError(f"--adapters: got {len(adapters)} adapters, wanted one; more at a time are not supported yet")
    path = Path(adapters[0]).expanduser()
    checkpoints = [] if (path / ADAPTER_CONFIG_FILE).exists() else list_checkpoints(path)
    path = checkpoints[-1] if checkpoints else path
    read_adapter_config(path)
    return path


def check_data(config: SftConfig | InferConfig | ExportConfig | DataConfig) -> None:
    """Register what plugins and descriptions of data sets say, and look whether all files are there. Needs no torch of ours.

    Raises:
        ConfigError: a plugin or a description is wrong. DataError: a file is missing or of no kind that is read, or the shares make no sense.
    """
    from mswift.data import check_sources, parse_spec
    from mswift.data.mixing import shares_of
    from mswift.data.registry import load_infos, load_plugins

    data = config.data
    load_plugins(data.external_plugins)
    load_infos(data.custom_dataset_info)
    shares_of([parse_spec(text).weight for text in data.dataset], data.shares())
    used = {"infer": data.val_dataset, "data": data.dataset}.get(config.verb, [*data.dataset, *data.val_dataset])
    check_sources(used, use_hf=config.model.use_hf)


def reading(config: SftConfig | InferConfig | ExportConfig | DataConfig) -> dict[str, Any]:
    """How `mswift.data.load_dataset` is to read rows, as its keyword arguments."""
    data = config.data
    return {
        "columns": data.columns or None,
        "strict": data.strict,
        "max_bad_share": data.max_bad_rows_ratio,
        "auto": not data.disable_auto_column_mapping,
        "use_hf": config.model.use_hf,
    }


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written to, before the work whose result it is for; leaves nothing behind.

    Raises:
        ConfigError: a file is in the way, or the nearest folder that exists takes no new entry.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{flag} {folder}: {existing} is not a folder; give another place")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".mswift-", dir=existing))
    except OSError as error:
        raise ConfigError(f"{flag} {folder}: {existing} cannot be written to ({error.strerror}); give another folder, or mend this one") from None


@contextmanager
def open_session(directory: Path, parallel: ParallelSection, runtime_section: RuntimeSection) -> Iterator[Session]:
    """Choose the device and join the other processes; leave them when the block ends.

    Raises:
        LayoutError: the layout does not fit the number of processes. LaunchError: the processes do not find each other.
    """
    quiet_libraries()
    import torch.distributed as dist

    from mswift.parallel.groups import make_groups
    from mswift.runtime.device import init_processes, leave_processes, select

    runtime = select(runtime_section.device)
    _choose_kernels(runtime_section.kernels)
    init_processes(runtime, backend=runtime_section.ddp_backend, timeout_s=runtime_section.ddp_timeout)
    try:
        layout = ParallelLayout(world=dist.get_world_size(), **parallel.sizes())
        yield Session(directory, runtime, make_groups(layout))
    finally:
        leave_processes()


def _choose_kernels(setting: str) -> None:
    # every operator makes itself known when it is imported
    from mswift.kernels import causal_attention, choice, cuda, elementwise, grouped_linear, linear_softmax, lora_linear, permute, quantised_linear  # noqa: F401

    choice.select(setting)
    cuda.demand()


def shared(value: T) -> T:
    """Rank 0's value, on every rank. Collective."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def quiet_libraries() -> None:
    """Keep what other libraries say to themselves off the user's screen; errors still come through."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|peft)\..*")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine|nvidia|CUDA_DEVICE_MAX_CONNECTIONS|ShardedTensor).*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    check_tokenizer(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain ones
        for path in (directory / name for name in ("tokenizer_config.json", "tokenizer.json")):
            if path.is_file():
                read_json(path)  # to blame the file that is no JSON at all
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(
            f"{directory} has no usable tokenizer ({reason}); wanted tokenizer.json and tokenizer_config.json; download them again"
        ) from error


def make_template(directory: Path, model: ModelSection, template: TemplateSection, adapter: Path | None = None) -> ChatTemplate:
    """The chat template of the run: the one of ``--template``, else the one that an adapter brings along, else the checkpoint's own.

    Raises:
        ModelError: the config or the tokenizer of the checkpoint is missing or wrong. DataError: as `template_for`.
    """
    from mswift.families.model import read_hf_config
    from mswift.templates.served import read_own_template

    read_hf_config(directory, trust_remote_code=model.trust_remote_code)  # the tokenizer reads it too, and would be blamed for it
    own = None if adapter is None else read_own_template(adapter)
    return template_for(load_tokenizer(directory, trust_remote_code=model.trust_remote_code), template, own)


def template_for(tokenizer: Any, template: TemplateSection, own: str | None = None) -> ChatTemplate:
    """The chat template with the settings of the run, for a tokenizer.

    Args:
        own: Jinja text in place of the tokenizer's own.

    Raises:
        DataError: there is no chat template, or the tokenizer lacks the tokens of the one that was named.
    """
    from mswift.log import get_logger
    from mswift.templates import ChatTemplate
    from mswift.templates.named import find_template

    named = find_template(template.template) if template.template else None
    if named is not None:
        named.check(tokenizer)
    given = own if named is None else named.text
    text = given or tokenizer.chat_template
    loss_scale, hybrid = template.loss_scale, isinstance(text, str) and "enable_thinking" in text
    if hybrid and not (template.disable_ignore_empty_think or "ignore_empty_think" in loss_scale or loss_scale.startswith("all")):
        loss_scale += "+ignore_empty_think"
        get_logger(__name__).info("empty reasoning is not trained (--loss_scale %s); --disable_ignore_empty_think true trains it", loss_scale)
    return ChatTemplate(
        tokenizer,
        system=template.system,
        loss_scale=loss_scale,
        enable_thinking=template.enable_thinking,
        chat_template=given,
        stop_words=() if named is None else named.stop_words,
        add_non_thinking_prefix=template.add_non_thinking_prefix,
        agent_template=template.agent_template,
    )


def check_template(template: TemplateSection) -> None:
    """Look whether the names in the template's settings are known; needs no torch.

    Raises:
        ConfigError: with the nearest name.
    """
    from mswift.templates import parse_loss_scale
    from mswift.templates.dialects import check_name
    from mswift.templates.named import find_template

    parse_loss_scale(template.loss_scale)
    if template.template:
        find_template(template.template)
    if template.agent_template:
        check_name(template.agent_template)


def make_encoder(directory: Path, config: SftConfig) -> RowEncoder:
    """What makes tokens of the rows of a run: plain text for ``mswift pt``, else the checkpoint's chat template. Raises as `make_template`."""
    from mswift.families.model import read_hf_config
    from mswift.templates import PlainText

    if config.verb != "pt":
        return make_template(directory, config.model, config.template)
    read_hf_config(directory, trust_remote_code=config.model.trust_remote_code)
    return PlainText(load_tokenizer(directory, trust_remote_code=config.model.trust_remote_code))


def load_model(
    session: Session, model: ModelSection, parallel: ParallelSection, *, deferred: bool = False, further: bool = False, **transformer: Any
) -> MegatronModel:
    """The megatron model of this process, read from the session's directory.

    Args:
        deferred: leave reading weights to `MegatronModel.ensure`. further: also the layers that predict further ahead.
        transformer: more TransformerConfig fields.
    """
    from mswift.engines.megatron_model import BuildSettings, MegatronModel
    from mswift.log import get_logger, progress_bar

    settings = BuildSettings(
        directory=session.directory,
        dtype=model.torch_dtype,
        sequence_parallel=parallel.sequence_parallel,
        trust_remote_code=model.trust_remote_code,
        allow_unknown_config=model.allow_unknown_config,
        deferred=deferred,
        further=further,
        transformer=transformer,
    )
    gc.freeze()  # what the libraries have made stays; building a model would make Python look through it many times
    with progress_bar("loading the model") as progress:
        loaded = MegatronModel(settings, session.groups, session.runtime, progress=progress)
    for what, count in loaded.left_out.items():
        get_logger(__name__).warning("%d tensors of %s are left out: %s; an export %s", count, session.directory, what, _fate(loaded))
    return loaded


def _fate(model: MegatronModel) -> str:
    if model.reader is None:
        return "will not have them"
    return "to Hugging Face's form has them as they are, a Megatron checkpoint will not have them"
