"""What the decoder families share: the config fields that mean the same everywhere, windows, and the rules of a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mswift.conversion.file_forms import stacked_in, with_stacks
from mswift.conversion.rules import AnyRule, Drop, FusedGateUp, FusedQKV, PaddedRows, Rename, Rule, TiedHead
from mswift.errors import ModelError
from mswift.families.base import AttentionStyle, HfConfig, MegatronDescription, ModelFamily, NormStyle, Padding, register
from mswift.families.delta_nets import delta_rules
from mswift.families.latent import latent_rules
from mswift.families.mixtures import ExpertNames, expert_rules
from mswift.families.rotations import rotation

if TYPE_CHECKING:
    import torch

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
MTP_BLOCK = "transformer_layer"
"""What megatron-core calls the block inside a layer that predicts further ahead."""
SHARED_COPY = "a copy of what the model has"
FURTHER_LAYERS = "layers that predict tokens further ahead (MTP)"
PRE_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}


@dataclass(frozen=True)
class FurtherNames:
    """What a checkpoint calls the tensors of a layer that predicts further ahead, without ``.weight``.

    In each, ``{layer}`` is its number behind those of the model (DeepSeek-V3), ``{index}`` its number among its kind. Where only the block has a
    number, the rest is one for all, and more than one layer cannot be expressed.

    Args:
        copies: those that are copies of the embedding, of the head; full names.
    """

    block: str = "model.layers.{layer}."
    enorm: str = "model.layers.{layer}.enorm"
    hnorm: str = "model.layers.{layer}.hnorm"
    norm: str = "model.layers.{layer}.shared_head.norm"
    eh_proj: str = "model.layers.{layer}.eh_proj"
    copies: tuple[str, str] | None = ("model.layers.{layer}.embed_tokens.weight", "model.layers.{layer}.shared_head.head.weight")

    @property
    def numbered_on(self) -> bool:
        """Whether they are called as further layers of the model."""
        return "{layer}" in self.block

    def numbered(self, layer: int, index: int) -> FurtherNames:
        """Those of one layer."""
        given = {"layer": layer, "index": index}
        block, enorm, hnorm, norm, eh_proj = (name.format(**given) for name in (self.block, self.enorm, self.hnorm, self.norm, self.eh_proj))
        copies = None if self.copies is None else (self.copies[0].format(**given), self.copies[1].format(**given))
        return FurtherNames(block, enorm, hnorm, norm, eh_proj, copies)


@dataclass(frozen=True)
class TensorNames:
    """What a family calls the tensors of a block, below ``model.layers.N.`` and without ``.weight``.

    Args:
        qkv: query, key and value projections; the same name three times where they are one tensor. gate_up: likewise of the MLP.
        up: the first MLP layer where it is not gated. norms: our name -> the family's. head_norms: of queries, of keys. sinks: the whole name.
        experts: of the layers that have some. delta_inputs: how delta nets are written, see `delta_rules`. dropped: tensors of a checkpoint
            that are left out. further: of layers that predict further ahead.
    """

    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    head_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    sinks: str = "self_attn.sinks"
    experts: ExpertNames = field(default_factory=ExpertNames)
    delta_inputs: Literal["packed", "separate"] = "separate"
    dropped: tuple[Drop, ...] = ()
    further: FurtherNames = field(default_factory=FurtherNames)


def field_of(hf: HfConfig, *names: str, default: Any = None) -> Any:
    """The first of these config fields that is there and not None."""
    found = (getattr(hf, name, None) for name in names)
    return next((value for value in found if value is not None), default)


def head_size(hf: HfConfig) -> int:
    """Columns of one attention head: ``head_dim``, else the hidden size over the heads."""
    return int(field_of(hf, "head_dim", default=hf.hidden_size // hf.num_attention_heads))


def activation(name: str, allowed: tuple[str, ...], kind: str) -> Any:
    """The function of an activation's name.

    Raises:
        ModelError: it is none of those that this family has.
    """
    from functools import partial

    from torch.nn import functional

    known = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
        "relu2": squared_relu,
    }
    if name not in allowed:
        wanted = " or ".join(repr(each) for each in allowed)
        raise ModelError(f"hidden_act is {name!r}, wanted {wanted} for {kind}; this variant is not supported")
    return known[name]


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return x.relu().square()


def transformer_fields(hf: HfConfig, activations: tuple[str, ...] = ("silu",)) -> dict[str, Any]:
    """TransformerConfig fields that every decoder family here reads alike.

    Raises:
        ModelError: an activation that these families do not have.
    """
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": field_of(hf, "intermediate_size", "moe_intermediate_size"),
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": head_size(hf),
        "layernorm_epsilon": field_of(hf, *_EPSILONS),
        "normalization": "RMSNorm",  # the spec has norms of ours
        "activation_func": activation(field_of(hf, "hidden_activation", "hidden_act"), activations, hf.model_type),
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": float(field_of(hf, "attention_dropout", default=0.0)),
        "init_method_std": hf.initializer_range,
    }


def windows(hf: HfConfig) -> dict[str, Any]:
    """window_size and window_attn_skip_freq (1 = windowed, 0 = full, by layer) where the config asks for windows; without ``layer_types`` in all."""
    window = field_of(hf, "sliding_window")
    kinds = field_of(hf, "layer_types", default=["sliding_attention"] * hf.num_hidden_layers)
    if window is None or not field_of(hf, "use_sliding_window", default=True) or "sliding_attention" not in kinds:
        return {}
    # megatron keeps keys at distance <= window_size[0]: W tokens, the query's own included, are W - 1
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds]}


def rotations(hf: HfConfig, **style: Any) -> AttentionStyle:
    """Attention with one rotation for all layers, or one for each layer type where ``rope_parameters`` are given by type."""
    head_dim, layers = head_size(hf), hf.num_hidden_layers
    kinds = field_of(hf, "layer_types", default=[])
    by_type = {kind for kind, value in hf.rope_parameters.items() if isinstance(value, dict)} & set(kinds)
    if not by_type:
        return AttentionStyle((rotation(hf, head_dim),), (0,) * layers, **style)
    order = sorted(by_type)
    return AttentionStyle(tuple(rotation(hf, head_dim, kind) for kind in order), tuple(order.index(kind) for kind in kinds), **style)


def describe_decoder(
    hf: HfConfig,
    *,
    attention: AttentionStyle | None = None,
    activations: tuple[str, ...] = ("silu",),
    transformer: Mapping[str, Any] | None = None,
    norm: NormStyle | None = None,
    **rest: Any,
) -> MegatronDescription:
    """The description of a decoder with grouped queries.

    Args:
        attention: one rotation and nothing else by default. transformer: fields of TransformerConfig on top of the common ones.
        rest: further fields of the description.
    """
    return MegatronDescription(
        transformer={**transformer_fields(hf, activations), **(transformer or {})},
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        tied=bool(hf.tie_word_embeddings),
        attention=attention or rotations(hf),
        norm=norm or NormStyle(),
        further_layers=field_of(hf, "num_nextn_predict_layers", default=0),
        **rest,
    )


def decoder_family(
    name: str,
    architectures: tuple[str, ...],
    describe: Callable[[HfConfig], MegatronDescription],
    names: TensorNames | None = None,
    model_types: tuple[tuple[str, str], ...] = (),
    limits: str = "",
    holders: tuple[str, ...] = (),
) -> ModelFamily:
    """Register a family whose rules follow from its description and its names; see `ModelFamily` for the rest."""
    known = names or TensorNames()

    def rules(hf: HfConfig, padding: Padding) -> tuple[AnyRule, ...]:
        return decoder_rules(describe(hf), padding, known)

    def further(hf: HfConfig, padding: Padding, count: int) -> tuple[AnyRule, ...]:
        return further_rules(describe(hf).with_further(count), padding, known)

    def count(hf: HfConfig, tensors: Iterable[str]) -> int:
        return count_further(describe(hf), set(tensors), known)

    return register(ModelFamily(name, architectures, describe, rules, further, count, model_types, limits, holders))


def decoder_rules(description: MegatronDescription, padding: Padding, names: TensorNames) -> tuple[AnyRule, ...]:
    """One rule for every tensor of a decoder."""
    rules: list[AnyRule] = [
        PaddedRows("embedding.word_embeddings.weight", "model.embed_tokens.weight", description.vocab_size, padding.vocab),
        *_norm("decoder.final_layernorm", "model.norm", description),
        Drop(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a constant that old checkpoints carry"),
        *names.dropped,
    ]
    if description.tied:
        rules.append(TiedHead("output_layer.weight", "model.embed_tokens.weight", description.vocab_size, padding.vocab))
        rules.append(Drop(r"lm_head\.weight", "tied to the embedding", equals="model.embed_tokens.weight"))
    else:
        rules.append(PaddedRows("output_layer.weight", "lm_head.weight", description.vocab_size, padding.vocab))
    if description.further_layers and names.further.numbered_on:
        first = description.transformer["num_layers"]
        numbers = "|".join(str(first + index) for index in range(description.further_layers))
        rules.append(Drop(rf"model\.layers\.({numbers})\..*", FURTHER_LAYERS, told=True))
    if description.head_bias:
        rules.append(PaddedRows("output_layer.bias", "lm_head.bias", description.vocab_size, padding.vocab))
    for layer in range(description.transformer["num_layers"]):
        rules += _layer(f"decoder.layers.{layer}.", f"model.layers.{layer}.", layer, description, padding, names)
    return tuple(rules)


def _layer(ours: str, theirs: str, layer: int, description: MegatronDescription, padding: Padding, names: TensorNames) -> list[Rule]:
    rules: list[Rule] = []
    for mine, its in names.norms.items():
        rules += _norm(ours + mine, theirs + its, description)
    if description.is_recurrent(layer):
        rules += delta_rules(ours + "self_attention.", theirs, description, names.delta_inputs)
    else:
        rules += _attention(ours + "self_attention.", theirs, description, padding, names)
    if description.is_mixture(layer):
        return rules + expert_rules(ours + "mlp.", theirs, description, names.experts)
    return rules + _mlp(ours + "mlp.", theirs, description, names)


def further_rules(description: MegatronDescription, padding: Padding, names: TensorNames) -> tuple[AnyRule, ...]:
    """The rules of the layers that predict further ahead; copies of the embedding and the head that stand beside them are dropped."""
    rules: list[AnyRule] = []
    first, head = description.transformer["num_layers"], "model.embed_tokens.weight" if description.tied else "lm_head.weight"
    for index in range(description.built_further):
        ours, theirs = f"mtp.layers.{index}.", names.further.numbered(first + index, index)
        rules += _layer(f"{ours}{MTP_BLOCK}.", theirs.block, first + index, description, padding, names)
        for mine, its in (("enorm", theirs.enorm), ("hnorm", theirs.hnorm), ("final_layernorm", theirs.norm)):
            rules += _norm(ours + mine, its, description)
        rules.append(Rename(f"{ours}eh_proj.weight", f"{theirs.eh_proj}.weight"))
        copies = zip(theirs.copies or (), ("model.embed_tokens.weight", head))
        rules += [Drop(re.escape(copy), SHARED_COPY, equals=source) for copy, source in copies]
    return tuple(rules)


def all_rules(family: ModelFamily, hf: HfConfig, padding: Padding, further: int) -> tuple[AnyRule, ...]:
    """The rules of a family, with `further` layers that predict further ahead in the place of what drops them."""
    rules = family.rules(hf, padding)
    if not further or family.further_rules is None:
        return rules
    return (*(rule for rule in rules if not (isinstance(rule, Drop) and rule.reason == FURTHER_LAYERS)), *family.further_rules(hf, padding, further))


def count_further(description: MegatronDescription, tensors: Collection[str], names: TensorNames) -> int:
    """How many layers that predict further ahead a Hugging Face checkpoint has, of those that its config.json tells of, and that can be built.

    Where they are not numbered on behind the model's it is one or none: none if its tensors are not those that the rules name, all of them.
    """
    first = description.transformer["num_layers"]
    if names.further.numbered_on:
        layers = range(description.further_layers)
        return sum(f"{names.further.numbered(first + index, index).eh_proj}.weight" in tensors for index in layers)
    if description.further_layers != 1:
        return 0
    rules = further_rules(description.with_further(1), description.padding(1), names)
    read = {source for rule in with_stacks(rules, stacked_in(rules, tensors)) if isinstance(rule, Rule) for source in rule.sources}
    dropped = [drop for drop in names.dropped if drop.reason == FURTHER_LAYERS]
    return int(read == {name for name in tensors if any(drop.matches(name) for drop in dropped)})


def _norm(ours: str, theirs: str, description: MegatronDescription) -> list[Rule]:
    kinds = ("weight", "bias") if description.norm.bias else ("weight",)
    return [Rename(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in kinds]


def _attention(ours: str, theirs: str, description: MegatronDescription, padding: Padding, names: TensorNames) -> list[Rule]:
    fields = description.transformer
    if description.attention.latent is not None:
        return latent_rules(ours, f"{theirs}self_attn.", description, padding)
    heads, groups, head_dim = fields["num_attention_heads"], fields["num_query_groups"], fields["kv_channels"]

    def qkv(kind: str) -> Rule:
        q, k, v = (f"{theirs}{name}.{kind}" for name in names.qkv)
        target = f"{ours}linear_qkv.{kind}"
        sizes = {"num_groups": groups, "heads_per_group": heads // groups, "head_dim": head_dim, "padded_groups": padding.groups}
        return FusedQKV(target, q, k, v, **sizes, gated=fields.get("attention_output_gate", False))

    rules = [qkv("weight"), Rename(f"{ours}linear_proj.weight", f"{theirs}{names.output}.weight", columns=heads * head_dim)]
    if fields.get("add_qkv_bias"):
        rules.append(qkv("bias"))
    if description.output_bias:
        rules.append(Rename(f"{ours}linear_proj.bias", f"{theirs}{names.output}.bias"))
    padded_heads = padding.groups * (heads // groups)
    if description.attention.sinks:
        rules.append(PaddedRows(f"{ours}core_attention.softmax_offset", f"{theirs}{names.sinks}", heads, padded_heads))
    style, when = description.attention.head_norm, "rotated_" if description.attention.norm_last else ""
    if style not in (None, "rotated"):
        unit = head_dim if style == "full" else 1
        for letter, name, count, padded in zip("qk", names.head_norms, (heads, groups), (padded_heads, padding.groups), strict=True):
            target, source = f"{ours}{when}{letter}_layernorm.weight", f"{theirs}{name}.weight"
            rules.append(Rename(target, source) if style == "shared" else PaddedRows(target, source, count * unit, padded * unit))
    return rules


def _mlp(ours: str, theirs: str, description: MegatronDescription, names: TensorNames) -> list[Rule]:
    rules: list[Rule] = []
    for kind in ("weight", "bias") if description.mlp_bias else ("weight",):
        if description.transformer["gated_linear_unit"]:
            gate, up = (f"{theirs}{name}.{kind}" for name in names.gate_up)
            rules.append(FusedGateUp(f"{ours}linear_fc1.{kind}", gate, up))
        else:
            rules.append(Rename(f"{ours}linear_fc1.{kind}", f"{theirs}{names.up}.{kind}"))
        rules.append(Rename(f"{ours}linear_fc2.{kind}", f"{theirs}{names.down}.{kind}"))
    return rules
