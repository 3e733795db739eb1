"""What every command does first: find the model, choose the device, join the processes, read the tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mswift.config import ModelSection, ParallelSection, RuntimeSection, TemplateSection
from mswift.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mswift.engines.megatron_model import MegatronModel
    from mswift.parallel.groups import Groups
    from mswift.runtime.device import Runtime
    from mswift.templates.chat import ChatTemplate


@dataclass(frozen=True)
class Session:
    """The processes of one command, joined.

    Args:
        directory: the model on this machine. runtime, groups: device and place of this process.
    """

    directory: Path
    runtime: Runtime
    groups: Groups


def find_model(model: ModelSection) -> Path:
    """The local directory of ``--model``, checked for what a checkpoint needs before anything heavy starts.

    Raises:
        ModelError: no such model, or a file is missing or damaged.
    """
    from mswift.conversion.hub import resolve_model
    from mswift.conversion.safetensors_io import CheckpointReader

    directory = resolve_model(
        model.model, use_hf=model.use_hf, revision=model.model_revision, token=model.hub_token, trust_remote_code=model.trust_remote_code
    )
    CheckpointReader(directory).close()
    return directory


@contextmanager
def open_session(directory: Path, parallel: ParallelSection, runtime_section: RuntimeSection) -> Iterator[Session]:
    """Choose the device and join the other processes; leave them when the block ends.

    Raises:
        LayoutError: the layout does not fit the number of processes. LaunchError: the processes do not find each other.
    """
    quiet_libraries()
    import torch.distributed as dist

    from mswift.parallel.groups import make_groups
    from mswift.parallel.layout import ParallelLayout
    from mswift.runtime.device import init_processes, leave_processes, select

    runtime = select(runtime_section.device)
    init_processes(runtime, backend=runtime_section.ddp_backend, timeout_s=runtime_section.ddp_timeout)
    try:
        layout = ParallelLayout(world=dist.get_world_size(), **parallel.sizes())
        if layout.cp > 1 or layout.ep > 1:
            raise ConfigError(f"context and expert parallelism are not supported yet, got cp({layout.cp}) and ep({layout.ep}); use 1")
        yield Session(directory, runtime, make_groups(layout))
    finally:
        leave_processes()


def quiet_libraries() -> None:
    """Keep what other libraries say to themselves off the user's screen; errors still come through."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|peft)\..*")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine|nvidia|CUDA_DEVICE_MAX_CONNECTIONS).*")


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{directory} has no usable tokenizer ({reason}); wanted tokenizer.json and tokenizer_config.json beside it") from error


def make_template(directory: Path, model: ModelSection, template: TemplateSection) -> ChatTemplate:
    """The checkpoint's own chat template with the settings of the run."""
    from mswift.templates.chat import ChatTemplate

    tokenizer = load_tokenizer(directory, trust_remote_code=model.trust_remote_code)
    return ChatTemplate(tokenizer, system=template.system, loss_scale=template.loss_scale, enable_thinking=template.enable_thinking)


def load_model(session: Session, model: ModelSection, parallel: ParallelSection, **transformer: Any) -> MegatronModel:
    """The megatron model of this process, read from the session's directory; `transformer` are further TransformerConfig fields."""
    from mswift.engines.megatron_model import BuildSettings, MegatronModel
    from mswift.log import progress_bar

    settings = BuildSettings(
        directory=session.directory,
        dtype=model.torch_dtype,
        sequence_parallel=parallel.sequence_parallel,
        trust_remote_code=model.trust_remote_code,
        transformer=transformer,
    )
    with progress_bar("loading the model") as progress:
        return MegatronModel(settings, session.groups, session.runtime, progress=progress)
