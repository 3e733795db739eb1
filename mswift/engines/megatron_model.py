"""A megatron model read from a Hugging Face directory: load, adapt, export. Training and generation both start here."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from mswift.conversion.collective import ExportGroups, Spread
from mswift.conversion.coverage import rules_by_target
from mswift.conversion.directories import CONFIG_FILE, is_megatron, read_json
from mswift.conversion.dist_checkpoint import StoredTensors
from mswift.conversion.export import ExportReport, export_model, with_field
from mswift.conversion.export_plan import ExportParameter
from mswift.conversion.file_forms import TOWER, renamed, stacked_in, with_stacks
from mswift.conversion.load import LoadPlan, LocalParameter, Progress, all_names, gather_names, plan_load
from mswift.conversion.quantised import open_checkpoint
from mswift.conversion.rules import AnyRule
from mswift.conversion.safetensors_io import TensorReader, bytes_of
from mswift.conversion.shards import Axis
from mswift.conversion.staging import TextFile, stamp_of
from mswift.engines import further, megatron_adapter
from mswift.engines.megatron_checkpoint import read_checkpoint, stacked_of, wider_names
from mswift.errors import ConfigError
from mswift.families import find_family, text_config
from mswift.families.base import HfConfig, MegatronDescription, ModelFamily, choose_dtype
from mswift.families.common import all_rules
from mswift.families.fields import describe_checked
from mswift.families.model import base_parameters, build_model, global_name, read_hf_config, transformer_config
from mswift.families.modules import CausalLM, SharedSequence, packed_rows
from mswift.kernels.quantised_linear import QuantisedWeight
from mswift.parallel.groups import Groups
from mswift.runtime.device import Runtime
from mswift.tuners.lora import Adapter, LoraSettings, lora_modules
from mswift.tuners.quantised import QuantSettings, quantise
from mswift.tuners.targets import kind_of
from mswift.tuners.wrap import add_lora

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Of a model with a vision tower."""
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class BuildSettings:
    """How to hold a checkpoint in memory.

    Args:
        directory: Hugging Face directory. dtype: ``bfloat16``, ``float32`` or None for the checkpoint's own.
        sequence_parallel: split activations over tensor-parallel ranks between the products.
        allow_unknown_config: go on where config.json has fields that may change the model and that its family does not read.
        deferred: leave reading the weights to `MegatronModel.ensure`.
        further: also the layers that predict further ahead (MTP), which are all or none; without them an export copies those of a Hugging Face
            directory as they are.
        transformer: further TransformerConfig fields (recomputation).
    """

    directory: Path
    dtype: str | None = None
    sequence_parallel: bool = False
    trust_remote_code: bool = False
    allow_unknown_config: bool = False
    deferred: bool = False
    further: bool = False
    transformer: dict[str, Any] | None = None


class MegatronModel:
    """The chunks of one rank, and everything that is needed to write them back.

    Attributes:
        chunks: the model chunks of this rank. family, hf_config, description: what the checkpoint is.
        tokenizer_directory: where the small files of an export are copied from. beside: those that are written in their place.
        stacked: what the checkpoint has stacks of experts for, see `stacked_in`.
        lora: settings of the adapters in the chunks, or None. quantised: weights that the chunks have in codes only. held_wider: weights that
            are in fp32 here (routers) and in `dtype` in the checkpoint.
    """

    def __init__(self, settings: BuildSettings, groups: Groups, runtime: Runtime, *, progress: Progress | None = None) -> None:
        self.settings, self.groups, self.runtime = settings, groups, runtime
        self.hf_config: HfConfig = read_hf_config(settings.directory, trust_remote_code=settings.trust_remote_code)
        self.family: ModelFamily = find_family(self.hf_config.architectures, str(settings.directory))
        path = settings.directory / CONFIG_FILE
        raw, allowed = text_config(read_json(path), str(path)), settings.allow_unknown_config
        self.description: MegatronDescription = describe_checked(self.family, raw, self.hf_config, str(path), allow_unknown=allowed)
        reader = None if is_megatron(settings.directory) else open_checkpoint(settings.directory)
        if settings.further:
            self.description = self.description.with_further(further.count_in(settings.directory, self.family, self.hf_config, reader))
        self.dtype: torch.dtype = _DTYPES[choose_dtype(settings.dtype, self.hf_config.dtype, str(settings.directory))]
        self.config = transformer_config(
            self.description, groups, runtime, dtype=self.dtype, sequence_parallel=settings.sequence_parallel, **(settings.transformer or {})
        )
        rules = all_rules(self.family, self.hf_config, self.description.padding(groups.layout.tp), self.description.built_further)
        self.stacked = stacked_of(settings.directory) if reader is None else stacked_in(rules, reader.names)
        self.rules: tuple[AnyRule, ...] = with_stacks(rules, self.stacked)
        self.chunks: list[CausalLM] = build_model(self.description, self.config, groups)
        self.lora: LoraSettings | None = None
        self.held_wider: set[str] = set()
        self.unread: dict[str, int] = {}
        self.quantised: dict[str, QuantisedWeight] = {}
        self.tokenizer_directory, self.beside = settings.directory, list[TextFile]()
        self._plan: LoadPlan | None = None
        self._later: LoadPlan | StoredTensors | None = None
        local = self._local_parameters()
        if reader is None:
            self._later = read_checkpoint(self, local, deferred=settings.deferred)
            self.held_wider = wider_names(settings.directory)
        else:
            self._plan = plan_load(local, self.rules, reader, model_parameters=all_names(local))
            self.held_wider = self._plan.stored_in(self.dtype)
            if settings.deferred:
                self._plan.once, self._later = True, self._plan
            else:
                self._plan.fill_all(progress)

    def ensure(self, tensor: torch.Tensor) -> None:
        """Read the weights of a parameter, or of a view of it, now if that was `deferred`."""
        if self._later is not None:
            self._later.fill(tensor)

    def release(self, tensor: torch.Tensor) -> None:
        """Give back the memory of a parameter that `ensure` has read, or would read, if reading was `deferred`."""
        if self._later is not None:
            self._later.release(tensor)

    def expect(self, tensor: torch.Tensor) -> None:
        """Let the system begin to read what `ensure` will be asked for next."""
        if self._later is not None:
            self._later.expect(tensor)

    @property
    def padded_heads(self) -> str:
        """One line on attention heads that were added so that the layout divides them; empty where none were."""
        real, padded = self.description.transformer["num_query_groups"], self.config.num_query_groups
        if real == padded:
            return ""
        heads = real * self.description.heads_per_group
        return f"{heads} attention heads padded to {self.config.num_attention_heads} for tp{self.groups.layout.tp}; zeros, exact, cut off on export"

    @property
    def left_out(self) -> dict[str, int]:
        """How many tensors of the checkpoint this model has no place for, by what they are."""
        return self.unread if self._plan is None else self._plan.left_out

    @property
    def reader(self) -> TensorReader | None:
        """The Hugging Face directory that the model is read from; None where it is a Megatron checkpoint."""
        return None if self._plan is None else self._plan.reader

    def stored_name(self, name: str) -> str:
        """What the checkpoint that the model is read from calls a tensor."""
        return name if self.reader is None else self.reader.stored_name(name)

    @property
    def linear_names(self) -> set[str]:
        """Those kinds of `ADAPTABLE` that this model has, over all pipeline stages."""
        return set(map(kind_of, megatron_adapter.adaptable_modules(self.rules)))

    def _local_parameters(self) -> list[LocalParameter]:
        found = (entry for chunk in self.chunks for entry in base_parameters(chunk, self.groups))
        return [LocalParameter(name, parameter.data, shard) for name, parameter, shard in found]

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the whole model, this rank's part) of every weight, adapters left out."""
        for chunk in self.chunks:
            for name, tensor, _ in base_parameters(chunk, self.groups):
                yield name, tensor.detach()

    def logits(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor | None:
        """fp32 ``[b, s, vocabulary]`` of int64 ``[b, s]`` without dropout, on the last pipeline stage; None on the others. Collective.

        Args:
            cu_seqlens: where each row begins if `input_ids` ``[1, t]`` are rows end to end; see `MicroBatch`.
        """
        sequence, width = SharedSequence(self.groups.collection.cp), input_ids.shape[1]
        multiple = 2 * sequence.size * self.groups.layout.tp if sequence.size > 1 else 1
        padded = torch.nn.functional.pad(input_ids, (0, -width % multiple)).to(self.runtime.device)
        positions = sequence.take(torch.arange(padded.shape[1], device=padded.device).expand(padded.shape), 1)
        ids, length = sequence.take(padded, 1), None if cu_seqlens is not None else width
        packed = None if cu_seqlens is None else packed_rows(cu_seqlens, self.runtime.device)

        def forward_step(_batches: Any, chunk: CausalLM) -> tuple[torch.Tensor, Any]:
            logits = chunk(ids, positions, None, runtime_gather_output=True, packed_seq_params=packed, rotary_length=length)
            return logits, lambda logits, non_loss_data: logits

        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            found = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[None] * len(self.chunks),
                model=self.chunks,
                num_microbatches=self.groups.layout.pp,  # an interleaved pipeline wants that many
                seq_length=ids.shape[1],
                micro_batch_size=len(ids),
                forward_only=True,
                collect_non_loss_data=True,
            )
        if not found:
            return None
        logits = found[0][..., : self.description.vocab_size].float()
        return logits if sequence.size == 1 else sequence.whole(logits.transpose(0, 1)).transpose(0, 1)[:, :width]

    def add_lora(self, settings: LoraSettings) -> list[str]:
        """Freeze the base and wrap the target layers; returns their global names. Collective.

        Raises:
            ConfigError: no module of this model is a target.
        """
        rules = rules_by_target(self.rules)

        def width(name: str) -> int | None:
            return rules[f"{name}.weight"].source_columns

        wrapped = [name for chunk in self.chunks for name in add_lora(chunk, settings, functools.partial(global_name, chunk), width)]
        if not gather_names(wrapped):  # a stage may have none: the embedding alone
            raise ConfigError(f"--target_modules {' '.join(settings.targets)}: no layer of this model has such a name; use all-linear")
        self.lora = settings
        if settings.use_dora:
            for _, module in self.adapters():
                self.ensure(module.base_weight)
                module.start_magnitudes()
        return wrapped

    def quantise(self, settings: QuantSettings, progress: Progress | None = None) -> None:
        """Keep the frozen linear layers under the adapters quantised, then read whatever is left of a `deferred` model. Collective.

        A weight that has not been read before is read and quantised at once, so that the plain ones are never in memory together.

        Raises:
            ConfigError: there is no adapter, or one with DoRA.
        """
        if self.lora is None or self.lora.use_dora:
            raise ConfigError(f"--quant_bits {settings.bits} is for LoRA without DoRA; add an adapter, or leave --use_dora out")
        plan = self._plan

        def read(name: str, parameter: torch.Tensor) -> torch.Tensor:
            if plan is None:
                self.ensure(parameter)
                values = parameter.detach().clone()
                self.release(parameter)
                return values
            values = plan.read(name)
            plan.forget(name)
            if progress is not None:
                progress(plan.done, plan.total)
            return values

        for chunk in self.chunks:
            self.quantised |= quantise(chunk, settings, functools.partial(global_name, chunk), read)
        for left in self._local_parameters():
            if not left.tensor.is_meta:
                self.ensure(left.tensor)
        self._later = None  # nothing is read again or let go of from here on
        self.runtime.release_freed()

    @property
    def quantised_memory(self) -> str:
        """One line on the weights of this rank that are quantised."""
        kept = sum(weight.nbytes for weight in self.quantised.values())
        plain = sum(weight.shape[0] * weight.shape[1] for weight in self.quantised.values()) * self.dtype.itemsize
        bits = "int8" if any(not weight.block for weight in self.quantised.values()) else "nf4"
        return f"{len(self.quantised)} linear layers in {bits}: {kept / 2**20:,.1f} MiB in place of {plain / 2**20:,.1f} on each process"

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """(global name of the adapted weight, module) on this rank."""
        for chunk in self.chunks:
            for _, module in lora_modules(chunk):
                yield module.weight_name, module

    @property
    def adapter_coverage(self) -> str:
        """One line on what has an adapter and what has none. Collective."""
        return megatron_adapter.describe_adapters(self)

    def load_adapter(self, directory: Path, *, dropout: float = 0.0) -> None:
        """Put a PEFT adapter into the model; see `megatron_adapter.load_adapter`."""
        megatron_adapter.load_adapter(self, directory, dropout)

    def export_adapter(self, directory: Path, *, base_model: str, form: str | None = None, exist_ok: bool = False) -> None:
        """Write the adapter as a PEFT directory; see `megatron_adapter.export_adapter`.

        Args:
            base_model: id or path that the adapter names as its base. form: of routed experts. exist_ok: replace an earlier export.
        """
        megatron_adapter.export_adapter(self, directory, base_model=base_model, form=form, exist_ok=exist_ok)

    def tokenizer_files(self) -> list[Path | TextFile]:
        """Tokenizer, chat template and generation config, to be copied or written beside what is exported."""
        written = {file.name for file in self.beside}
        names = [name for name in TOKENIZER_FILES if name not in written]
        return [*(path for name in names if (path := self.tokenizer_directory / name).is_file()), *self.beside]

    def _processor_files(self) -> list[Path]:
        """What prepares images, where the checkpoint has what sees them."""
        files = (self.settings.directory / name for name in PROCESSOR_FILES)
        return [path for path in files if path.is_file()] if TOWER.reason in self.left_out else []

    def _adapter_digest(self) -> str:
        """SHA-256 of this rank's part of the adapters."""
        digest = hashlib.sha256()
        for _, module in self.adapters():
            for factor in module.factors.values():
                digest.update(bytes_of(factor.detach().cpu().contiguous()))
        return digest.hexdigest()

    def _export_groups(self) -> ExportGroups:
        layout, coords = self.groups.layout, self.groups.coords
        tp_group = self.groups.tp if layout.tp > 1 else None
        replica = coords.dp * layout.cp + coords.cp
        spreads: dict[Axis, Spread] = {"tp": Spread(tp_group, coords.tp, layout.tp, coords.pp, layout.pp, replica, layout.dp * layout.cp)}
        if layout.ep > 1:
            here = layout.expert_coords(self.groups.rank)
            place = {"place": coords.pp * layout.ep + here.ep, "num_places": layout.pp * layout.ep}
            etp_group = self.groups.collection.expt_tp if layout.expert_tp > 1 else None
            spreads["etp"] = Spread(etp_group, here.etp, layout.expert_tp, replica=here.replica, num_replicas=layout.expert_replicas, **place)
        return ExportGroups(spreads)

    def _exported_config(self) -> dict[str, Any]:
        """The checkpoint's config.json; one that promises layers which were left out would have them made up at random."""
        config = json.loads((self.settings.directory / CONFIG_FILE).read_text(encoding="utf8"))
        counts = [name for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers") if name in config] or ["num_nextn_predict_layers"]
        return {**config, **dict.fromkeys(counts, 0)} if self.description.further_layers and self.unread else config

    def _plain(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The values of a weight, without adapter, as the checkpoint has them."""
        if name not in self.quantised:
            self.ensure(parameter)
            return parameter.detach()
        if self._plan is None:
            raise ConfigError("a quantised Megatron checkpoint is not merged here; merge the adapter with mswift export --merge_lora true")
        return self._plan.read(name)

    def _stored_dtype(self, name: str, parameter: torch.Tensor) -> torch.dtype:
        return self.dtype if name in self.held_wider else parameter.dtype

    def export_merged(
        self,
        directory: Path,
        *,
        max_shard_size: str,
        exist_ok: bool = False,
        keep: bool = False,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write the model, adapters merged in fp32 and rounded once, as a sharded Hugging Face directory; every rank writes its share.

        Of quantised weights, those of the checkpoint are written, read again.

        Args:
            keep: what is finished survives a failure or a kill. resume: go on with what an earlier call has kept.
        """
        merged = dict(self.adapters())
        own_head = megatron_adapter.needs_own_head(self)
        for module in merged.values():
            if module.lora_magnitude is not None:
                self.ensure(module.base_weight)
                module.prepare_merge()

        def value(name: str, parameter: torch.Tensor) -> torch.Tensor:
            base = self._plain(name, parameter)
            return merged[name].merged_weight(base) if name in merged else base

        parameters = [
            ExportParameter(
                name,
                tuple(parameter.shape),
                self._stored_dtype(name, parameter),
                shard,
                functools.partial(value, name, parameter),
                functools.partial(self.release, parameter),
                functools.partial(self.expect, parameter),
            )
            for chunk in self.chunks
            for name, parameter, shard in base_parameters(chunk, self.groups)
        ]
        for parameter in parameters:  # so that one takes the memory of another, not memory that was never touched
            parameter.release()
        carried, carried_rules = further.carried(self, value, own_head=own_head)
        source = None
        if keep:
            source = {"model": stamp_of(self.settings.directory), "adapter": self._adapter_digest()}
        return export_model(
            parameters + carried,
            [renamed(rule, self.stored_name) for rule in (*self.rules, *carried_rules)],
            directory,
            config=with_field(self._exported_config(), "tie_word_embeddings", False) if own_head else self._exported_config(),
            groups=self._export_groups(),
            extra_files=[*self.tokenizer_files(), *self._processor_files()],
            max_shard_size=max_shard_size,
            exist_ok=exist_ok,
            source=source,
            resume=resume,
            progress=progress,
        )
