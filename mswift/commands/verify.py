"""``mswift verify``: whether two models are one. Every tensor by SHA-256, then the logits of random tokens; a table of what differs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mswift.commands import session as sessions
from mswift.commands.session import Session, find_model, load_model, open_session
from mswift.config import VerifyConfig
from mswift.conversion.directories import is_megatron
from mswift.errors import DifferenceError
from mswift.log import get_logger, is_main_process, progress_bar

if TYPE_CHECKING:
    import torch

    from mswift.engines.megatron_model import MegatronModel

logger = get_logger(__name__)
_SHOWN = 20
_TOLERANCE = 1e-4  # of the largest logit, in fp32: the order of sums is another in another program


@dataclass(frozen=True, slots=True)
class Compared:
    """One tensor of both models: short digests, and equal or not."""

    name: str
    here: str
    there: str

    @property
    def equal(self) -> bool:
        return self.here == self.there


def check(config: VerifyConfig, world: int) -> None:
    """Find what can be found without torch.

    Raises:
        MswiftError: a model is missing or damaged, or the layout does not fit it.
    """
    sessions.check(config, world)
    sessions.check(dataclasses.replace(config, model=_other(config)), world)


def verify(config: VerifyConfig) -> None:
    """Compare ``--model`` with ``--against``, in all processes of the layout, and print a table.

    Raises:
        DifferenceError: a tensor or the logits differ; the exit code is 1.
    """
    here, there = find_model(config.model), find_model(_other(config))
    plain = not (is_megatron(here) or is_megatron(there))
    with open_session(here, config.parallel, config.runtime) as session:
        with progress_bar("comparing tensors") as progress:
            own = list(_files(session, here, there, progress) if plain else _parameters(config, session, there, progress))
        compared = {entry.name: entry for part in _everywhere(own) for entry in part}
        different = [entry for entry in compared.values() if not entry.equal]
        if is_main_process():
            _show(compared, different)
        distance, largest = _logits(config, session, here, there) if not different else (0.0, 1.0)
    if different:
        raise DifferenceError(f"{len(different)} of {len(compared)} tensors of {here} and {there} differ; they are listed above")
    if is_main_process():
        logger.info("logits of %d random tokens: differ by at most %.1e, the largest is %.1f", config.verify.num_tokens, distance, largest)
    if distance > _TOLERANCE * max(largest, 1.0):
        raise DifferenceError(f"the tensors of {here} and {there} are equal but their logits differ by {distance:.1e}; compare config.json")
    if is_main_process():
        print(f"equal: {here} and {there}")


def _other(config: VerifyConfig) -> Any:
    return dataclasses.replace(config.model, model=config.verify.against)


def _everywhere(own: list[Compared]) -> list[list[Compared]]:
    import torch.distributed as dist

    gathered: list[list[Compared]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return gathered


def _digest(tensor: torch.Tensor) -> str:
    from mswift.conversion.safetensors_io import bytes_of

    form = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    return f"{form} {hashlib.sha256(bytes_of(tensor.detach().cpu().contiguous())).hexdigest()[:16]}"


def _files(session: Session, here: Path, there: Path, progress: Any) -> Iterator[Compared]:
    """Two Hugging Face directories, tensor by tensor, dealt out to the ranks."""
    from mswift.conversion.quantised import open_checkpoint

    with open_checkpoint(here) as first, open_checkpoint(there) as second:
        names = sorted({*first.names, *second.names})
        mine = names[session.groups.rank :: session.groups.layout.world]
        for done, name in enumerate(mine, start=1):
            yield Compared(name, *(_digest(reader.read(name)) if name in reader.names else "absent" for reader in (first, second)))
            progress(done, len(mine))


def _parameters(config: VerifyConfig, session: Session, there: Path, progress: Any) -> Iterator[Compared]:
    """At least one Megatron checkpoint: this rank's part of every parameter, as both give it."""
    first = load_model(session, config.model, config.parallel, deferred=True, further=True)
    other = dataclasses.replace(session, directory=there)
    second = load_model(other, _other(config), config.parallel, deferred=True, further=True)
    theirs = dict(second.named_tensors())
    names = dict(first.named_tensors())
    place = f" (rank {session.groups.rank})" if session.groups.layout.world > 1 else ""
    for done, name in enumerate(sorted({*names, *theirs}), start=1):
        yield Compared(f"{name}{place}", *(_value(model, held.get(name)) for model, held in ((first, names), (second, theirs))))
        progress(done, len(names))


def _value(model: MegatronModel, tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "absent"
    model.ensure(tensor)
    return _digest(tensor)


def _show(compared: dict[str, Compared], different: list[Compared]) -> None:
    whole = hashlib.sha256("".join(f"{name} {compared[name].here}" for name in sorted(compared)).encode()).hexdigest()[:16]
    logger.info("tensors: %d of %d equal, by SHA-256 (all of them: %s)", len(compared) - len(different), len(compared), whole)
    width = max((len(entry.name) for entry in different[:_SHOWN]), default=0)
    for entry in different[:_SHOWN]:
        print(f"  {entry.name:{width}}  {entry.here}  |  {entry.there}")
    if len(different) > _SHOWN:
        print(f"  and {len(different) - _SHOWN} more")


def _logits(config: VerifyConfig, session: Session, here: Path, there: Path) -> tuple[float, float]:
    """(largest difference, largest logit) of both models in fp32, on the main process; zeros on the others. Collective."""
    import torch
    import torch.distributed as dist

    from mswift.families.model import read_hf_config

    vocabulary = read_hf_config(here, trust_remote_code=config.model.trust_remote_code).get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, config.verify.num_tokens), generator=torch.Generator().manual_seed(0))
    first, second = (_logits_of(config, dataclasses.replace(session, directory=directory), ids) for directory in (here, there))
    figures = torch.zeros(2)
    if first is not None and second is not None:
        figures = torch.stack(((first - second).abs().max(), first.abs().max()))
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    return float(figures[0]), float(figures[1])


def _logits_of(config: VerifyConfig, session: Session, ids: torch.Tensor) -> torch.Tensor | None:
    """A Megatron checkpoint through the engine, in the layout; a Hugging Face directory through transformers, which is the judge."""
    import torch

    section = dataclasses.replace(config.model, model=str(session.directory), torch_dtype="float32")
    if is_megatron(session.directory):
        return load_model(session, section, config.parallel, further=True).logits(ids)
    if not session.groups.is_last_stage:
        return None
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(session.directory, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code)
    with torch.no_grad():
        return model.eval()(ids).logits.float()
