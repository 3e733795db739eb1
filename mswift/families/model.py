"""The only place that builds a megatron model: layer spec, configuration, partition attributes, and names over all pipeline stages."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from mswift.conversion.directories import CONFIG_FILE, read_json
from mswift.conversion.shards import Shard
from mswift.errors import ModelError, one_line
from mswift.families.base import HfConfig, MegatronDescription, RouterStyle, find_family, text_config
from mswift.families.modules import (
    AddToResidual,
    BiasedColumnParallelLinear,
    BiasedExpertRowLinear,
    BiasedRowParallelLinear,
    CausalLM,
    DecoderAttention,
    DeltaNet,
    GroupedExperts,
    GroupedRouter,
    LatentAttention,
    Norm,
    ParallelBlock,
    RotaryTables,
    SdpaAttention,
    SharedExperts,
    SharedSequence,
    StyledRouter,
    gated_mlp,
    mixture_layer,
)
from mswift.families.te_names import fused_norms
from mswift.parallel.groups import Groups
from mswift.parallel.layout import ParallelLayout
from mswift.runtime.device import Runtime


def read_hf_config(directory: Path, *, trust_remote_code: bool = False) -> HfConfig:
    """The transformers config of a checkpoint directory, refused early if no family covers it.

    Raises:
        ModelError: config.json is unreadable, or the architecture is not supported.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = directory / CONFIG_FILE
    raw = read_json(path)
    text = text_config(raw, str(path))
    family = find_family(text.get("architectures"), str(directory))
    known = dict(family.model_types).get(raw.get("model_type", ""))
    try:
        if known is not None:
            return CONFIG_MAPPING[known].from_dict(raw)
        whole = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if text["architectures"] == raw["architectures"]:
            return whole
        part = whole.get_text_config()
        part.architectures, part.tie_word_embeddings = text["architectures"], whole.tie_word_embeddings
        part.dtype = whole.dtype or part.dtype
        return part
    except Exception as error:  # each config class checks its fields in its own way
        raise ModelError(f"{path} is not a valid {raw.get('model_type')} config: {one_line(error)}; mend it, or download it again") from error


def transformer_config(
    description: MegatronDescription, groups: Groups, runtime: Runtime, *, dtype: torch.dtype, sequence_parallel: bool = False, **extra: Any
) -> TransformerConfig:
    """megatron-core's configuration for this model, layout, device and dtype; `extra` fields (recomputation) are added.

    Raises:
        LayoutError: the layout does not divide the model. ConfigError: a setting that the device cannot run exactly.
    """
    layout = groups.layout
    fields = description.transformer
    experts = {"num_experts": fields.get("num_moe_experts", 0), "expert_size": fields.get("moe_ffn_hidden_size", 0)}
    latent = description.attention.latent
    widths = {"key_heads_of_delta_nets": fields.get("linear_num_key_heads", 0), "narrow": () if latent is None else latent.narrow}
    layout.check_model(num_layers=fields["num_layers"], ffn_size=fields["ffn_hidden_size"], **widths, **experts)
    groups_of_queries = description.padding(layout.tp).groups
    settings = {
        **runtime.transformer_settings(pp=layout.pp, vpp=layout.vpp),
        **fields,
        "qk_layernorm": description.attention.head_norm is not None,
        "num_query_groups": groups_of_queries,
        "num_attention_heads": groups_of_queries * description.heads_per_group,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "pipeline_model_parallel_layout": _stages(layout, fields["num_layers"], description.built_further),
        "mtp_num_layers": description.built_further or None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "sequence_parallel": sequence_parallel and layout.tp > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "perform_initialization": False,  # every parameter is read from the checkpoint, or the run fails
        "calculate_per_token_loss": True,
        "variable_seq_lengths": layout.pp > 1,  # micro batches are padded to their own longest row
        **extra,
    }
    runtime.check_settings(settings, tp=layout.tp, vpp=layout.vpp)
    return TransformerConfig(**settings)


def _stages(layout: ParallelLayout, num_layers: int, further: int) -> list[list[str]] | None:
    """What each virtual stage holds, in megatron-core's words; None where all hold equally much, which it finds by itself."""
    counts = layout.layers_of_stages(num_layers)
    if layout.split.is_even or layout.pp == 1:
        return None
    stages = [["decoder"] * count for count in counts]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], *["mtp"] * further, "loss"]]


def _layer_spec(config: TransformerConfig, description: MegatronDescription, groups: Groups, layer: int) -> ModuleSpec:
    """megatron's own local spec with our norms, attention and, where the family has them, biased linears and its own way to add up a block."""
    experts = config.num_moe_experts if description.is_mixture(layer) else None
    latent = description.attention.latent is not None
    spec = get_gpt_layer_local_spec(experts, moe_grouped_gemm=False, qk_layernorm=False, multi_latent_attention=latent, normalization="RMSNorm")
    block = spec.submodules
    norm = ModuleSpec(module=Norm, params={"style": description.norm})
    block.input_layernorm = norm if description.pre_norms else IdentityOp
    block.pre_mlp_layernorm = norm if description.pre_norms and not description.parallel else IdentityOp
    if description.post_norms or description.residual_scale != 1.0:
        after = {"config": config, "norm": description.norm if description.post_norms else None, "scale": description.residual_scale}
        block.self_attn_bda = block.mlp_bda = ModuleSpec(module=AddToResidual, params=after)
    if description.parallel:
        spec.module = ParallelBlock
    if description.is_recurrent(layer):
        block.self_attention = ModuleSpec(module=DeltaNet)
    else:
        _describe_attention(block.self_attention, description)
    block.sharded_state_dict_keys_map = fused_norms(description, layer)  # a checkpoint has the names that Transformer Engine knows
    if experts is not None:
        block.mlp = _mixture(description, groups)
    elif description.mlp_bias:
        block.mlp = gated_mlp(MLPSubmodules(linear_fc1=BiasedColumnParallelLinear, linear_fc2=BiasedRowParallelLinear), groups.tp)
    else:
        block.mlp = gated_mlp(MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear), groups.tp)
    return spec


def _mixture(description: MegatronDescription, groups: Groups) -> type[MoELayer]:
    """megatron's mixture; whole and ours, since its own spec has another form in later versions."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    of_experts = MLPSubmodules(linear_fc1=BiasedColumnParallelLinear, linear_fc2=BiasedExpertRowLinear) if description.expert_bias else linears
    router: Any = TopKRouter
    if description.router != RouterStyle():
        router = functools.partial(StyledRouter, style=description.router)
    elif description.choice is not None:
        router = functools.partial(GroupedRouter, choice=description.choice)
    submodules = MoESubmodules(
        experts=ModuleSpec(module=GroupedExperts, submodules=of_experts),
        shared_experts=ModuleSpec(module=SharedExperts, submodules=linears),
        router=router,
    )
    return mixture_layer(submodules, groups.collection)


def _describe_attention(spec: ModuleSpec, description: MegatronDescription) -> None:
    style = description.attention
    spec.submodules.core_attention = functools.partial(SdpaAttention, softcap=style.softcap, chunk_of_layer=style.chunk_of_layer, sinks=style.sinks)
    spec.params = {**spec.params, "style": style}
    if style.latent is not None:
        spec.module = LatentAttention
        spec.submodules.q_layernorm = spec.submodules.kv_layernorm = ModuleSpec(module=Norm, params={"style": style.norm})
    else:
        spec.module = DecoderAttention
        spec.params["real_groups"] = description.transformer["num_query_groups"]
        shared = style.head_norm == "shared" and not style.norm_last
        head_norm = ModuleSpec(module=Norm, params={"style": style.norm}) if shared else None
        spec.submodules.q_layernorm = spec.submodules.k_layernorm = head_norm
    if description.output_bias:
        spec.submodules.linear_proj = BiasedRowParallelLinear


def _further_spec(config: TransformerConfig, description: MegatronDescription, groups: Groups) -> ModuleSpec:
    """megatron-core's own modules that predict further ahead, with our norms and our blocks."""
    norm = ModuleSpec(module=Norm, params={"style": description.norm})
    layers = []
    for index in range(description.built_further):
        block = _layer_spec(config, description, groups, config.num_layers + index)
        layer = get_mtp_layer_spec_for_backend(block, backend=LocalSpecProvider())
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = norm
        layers.append(layer)
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=layers))


def build_model(description: MegatronDescription, config: TransformerConfig, groups: Groups) -> list[CausalLM]:
    """The model chunks of this rank (one, or one for each virtual stage), with uninitialised weights."""
    layout = groups.layout
    chunks = []
    for stage in range(layout.vpp):
        vp_stage, last = stage if layout.vpp > 1 else None, groups.is_last_stage and stage == layout.vpp - 1
        first = get_transformer_layer_offset(config, vp_stage, groups.coords.pp)
        specs = [_layer_spec(config, description, groups, first + layer) for layer in range(get_num_layers_to_build(config, vp_stage))]
        model = CausalLM(
            config,
            TransformerBlockSubmodules(layer_specs=specs, layer_norm=ModuleSpec(module=Norm, params={"style": description.norm})),
            vocab_size=description.padding(layout.tp).vocab,
            description=description,
            max_sequence_length=description.max_sequence_length,
            pre_process=groups.is_first_stage and stage == 0,
            post_process=last,
            share_embeddings_and_output_weights=description.tied,
            position_embedding_type="rope",
            pg_collection=groups.collection,
            vp_stage=vp_stage,
            mtp_block_spec=_further_spec(config, description, groups) if last and description.built_further else None,
        )
        model.rotary_pos_emb = RotaryTables(
            description.attention.rotations, model.rotary_pos_emb.inv_freq.device, SharedSequence(groups.collection.cp)
        )
        _mark_partitions(model)
        chunks.append(model)
    return chunks


def _mark_partitions(model: nn.Module) -> None:
    """Say which dim of each weight is split over tensor-parallel ranks.

    megatron-core does this while it initialises a weight and forgets it when initialisation is off; its optimizer would then count split
    gradients as replicated ones.
    """
    dims: list[tuple[type[nn.Module], int]] = [(ColumnParallelLinear, 0), (VocabParallelEmbedding, 0), (RowParallelLinear, 1)]
    for module in model.modules():
        for kind, dim in dims:
            if isinstance(module, kind) and module.weight is not None and "tensor_model_parallel" not in vars(module.weight):
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def global_name(model: CausalLM, name: str) -> str:
    """The name of a local parameter or module in the whole model: over all stages and experts; an adapter's base goes by the layer's own name."""

    def renumber(match: re.Match[str]) -> str:
        further = match[1].startswith("mtp")
        layer = model.mtp.layers[int(match[2])].transformer_layer if further else model.decoder.layers[int(match[2])]
        number = match[2] if further else layer.layer_number - 1
        expert = f"{match[4]}{layer.mlp.local_expert_indices[int(match[5])]}." if match[5] else ""
        return f"{match[1]}{number}.{match[3] or ''}{expert}"

    pattern = r"^(decoder\.layers\.|mtp\.layers\.)(\d+)\.(transformer_layer\.)?(?:(mlp\.experts\.local_experts\.)(\d+)\.)?"
    return re.sub(pattern, renumber, name).replace(".base_layer.", ".")


def base_parameters(model: CausalLM, groups: Groups) -> Iterator[tuple[str, Tensor, Shard]]:
    """(global name, tensor, which part of the whole it is) of every weight that a checkpoint has, buffers too; adapters are left out."""
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_a", ".lora_b", ".lora_magnitude")):
            yield global_name(model, name), parameter, shard_of(parameter, groups)
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):
            yield global_name(model, name), buffer, Shard()


def shard_of(parameter: Tensor, groups: Groups) -> Shard:
    """Which part of the whole tensor this rank holds, from megatron's own attributes."""
    if getattr(parameter, "allreduce", True):
        return Shard.of(parameter, groups.coords.tp, groups.layout.tp)
    return Shard.of(parameter, groups.layout.expert_coords(groups.rank).etp, groups.layout.expert_tp, "etp")
