"""Mixtures of experts: the config fields of their routers, and the rules of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mswift.conversion.rules import ExpertSlot, FusedGateUp, GatedSlab, Rename, Rule, Slab
from mswift.errors import ModelError
from mswift.families.base import ExpertChoice, HfConfig, MegatronDescription

OTHER_ROUTERS = "other routers than sigmoid with noaux_tc"
"""What `deepseek_mixture` refuses."""


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the tensors of a mixture of experts, below ``model.layers.N.`` and without ``.weight``.

    Args:
        router: chooses the experts. experts: expert E is ``EXPERTS.E.``. gate_up, down: below an expert and below `shared`.
        shared: the expert of all tokens. shared_gate: its own weight for each token. bias: added to the scores for the choice; a full name,
            of a tensor ``[1, experts]`` where `bias_has_rows`.
        stacks: names of the two tensors that hold the gate and up projections of all experts, and their down projections; full names. None: each
            expert has tensors of its own. transposed: matrices of the stacks are ``[in, out]``. woven: gate and up in turn.
    """

    router: str = "mlp.gate"
    bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"
    bias_has_rows: bool = False
    stacks: tuple[str, str] | None = None
    transposed: bool = False
    woven: bool = False
    router_module: str | None = None
    experts_module: str = "mlp.experts"
    declared: bool = False


def expert_rules(ours: str, theirs: str, description: MegatronDescription, names: ExpertNames) -> list[Rule]:
    """The rules of one mixture; every expert is two parameters by itself, whichever rank holds it."""

    def mlp(target: str, source: str) -> list[Rule]:
        gate, up = (f"{source}.{name}.weight" for name in names.gate_up)
        return [FusedGateUp(f"{target}.linear_fc1.weight", gate, up), Rename(f"{target}.linear_fc2.weight", f"{source}.{names.down}.weight")]

    fields = description.transformer
    module = None if names.router_module is None else f"{theirs}{names.router_module}"
    rules: list[Rule] = [Rename(f"{ours}router.weight", f"{theirs}{names.router}.weight", module=module)]
    if description.router.bias:
        rules.append(Rename(f"{ours}router.bias", f"{theirs}{names.router}.bias"))
    if description.corrects_choice:
        target, source = f"{ours}router.expert_bias", f"{theirs}{names.bias}"
        rules.append(Slab(target, source, 0, 1) if names.bias_has_rows else Rename(target, source))
    for expert in range(fields["num_moe_experts"]):
        target = f"{ours}experts.local_experts.{expert}"
        made = mlp(target, f"{theirs}{names.experts}.{expert}") if names.stacks is None else _slabs(target, theirs, expert, description, names)
        slot = ExpertSlot(f"{theirs}{names.experts_module}", "down_proj", expert, fields["num_moe_experts"], names.transposed, names.declared)
        for rule in made:
            first = rule.target.endswith("linear_fc1.weight")
            here = replace(slot, parameter="gate_up_proj", woven=names.woven) if first else slot
            rules.append(replace(rule, slot=here) if rule.target.endswith(".weight") else rule)
    if fields.get("moe_shared_expert_intermediate_size"):
        rules += mlp(f"{ours}shared_experts", f"{theirs}{names.shared}")
    if fields.get("moe_shared_expert_gate"):
        rules.append(Rename(f"{ours}shared_experts.gate_weight", f"{theirs}{names.shared_gate}.weight"))
    return rules


def _slabs(target: str, theirs: str, expert: int, description: MegatronDescription, names: ExpertNames) -> list[Rule]:
    """The rules of one expert whose tensors are slabs of those of all experts; a bias is called as its weight, with ``_bias`` behind."""
    count = description.transformer["num_moe_experts"]
    gate_up, down = (f"{theirs}{name}" for name in names.stacks or ())
    rules: list[Rule] = []
    for kind, behind in (("weight", ""), ("bias", "_bias"))[: 1 + description.expert_bias]:
        rules.append(GatedSlab(f"{target}.linear_fc1.{kind}", gate_up + behind, expert, count, names.transposed, names.woven))
        rules.append(Slab(f"{target}.linear_fc2.{kind}", down + behind, expert, count, names.transposed))
    return rules


def mixture_fields(
    hf: HfConfig, *, experts: int, topk: int, ffn_size: int, layers: list[int] | None = None, normalised: bool = True
) -> dict[str, Any]:
    """TransformerConfig fields of a mixture of experts whose router is a softmax.

    Args:
        ffn_size: of each expert. layers: 1 = mixture, 0 = dense; None: all are mixtures. normalised: the weights of the chosen experts sum to 1.

    Raises:
        ModelError: one normalised expert for each token, whose weight is 1 whatever the router says.
    """
    if topk == 1 and normalised:
        raise ModelError(f"one expert a token in {hf.model_type}: its weight is always 1, which megatron-core refuses; this is not supported")
    return {
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": ffn_size,
        "moe_layer_freq": layers or [1] * hf.num_hidden_layers,
        "moe_router_pre_softmax": not normalised,  # a softmax over the chosen logits alone is one over all, normalised
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def sparse_layers(hf: HfConfig) -> list[int]:
    """1 for each layer that is a mixture, as ``mlp_only_layers`` and ``decoder_sparse_step`` say."""
    dense = hf.mlp_only_layers or []
    return [int(layer not in dense and (layer + 1) % hf.decoder_sparse_step == 0) for layer in range(hf.num_hidden_layers)]


def sigmoid_router(factor: float = 1.0) -> dict[str, Any]:
    """TransformerConfig fields of a router whose scores are sigmoids, with a bias for the choice alone (DeepSeek-V3).

    Args:
        factor: on the weights.
    """
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": float(factor),
    }


def grouped_choice(hf: HfConfig, judged_by: int, normalised: bool) -> ExpertChoice:
    """The choice of experts by ``n_group`` and ``topk_group``.

    Raises:
        ModelError: the experts are no such groups, or the chosen groups hold fewer experts than are wanted.
    """
    experts, wanted, groups = hf.n_routed_experts, hf.num_experts_per_tok, hf.n_group or 1
    choice = ExpertChoice(groups, hf.topk_group or groups, judged_by, normalised)
    if experts % groups or (groups > 1 and experts // groups < judged_by) or choice.chosen_groups * (experts // groups) < wanted:
        raise ModelError(
            f"{experts} routed experts in n_group {groups}, of which topk_group {choice.chosen_groups} with num_experts_per_tok {wanted}: "
            f"wanted equal groups of at least {judged_by} and enough experts in the chosen ones; mend config.json"
        )
    return choice


def deepseek_mixture(hf: HfConfig) -> dict[str, Any]:
    """The mixture of DeepSeek-V3 and of those that took it over: dense layers first, then sigmoid routers and an expert of all tokens.

    Returns:
        TransformerConfig fields.

    Raises:
        ModelError: a router of another kind.
    """
    said = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    check_fields(hf, said)
    return {**deepseek_sizes(hf), **sigmoid_router(hf.routed_scaling_factor)}


def deepseek_choice(hf: HfConfig) -> ExpertChoice | None:
    """The choice of DeepSeek-V3: a group is judged by its two best experts. None where megatron-core's router does the same."""
    normalised, several = bool(hf.norm_topk_prob), hf.num_experts_per_tok > 1
    choice = grouped_choice(hf, 2, normalised)
    return None if choice.groups == 1 and normalised == several else choice


def deepseek_sizes(hf: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields of dense layers first, then mixtures with an expert of all tokens; the router is a plain softmax."""
    layers = [int(layer >= hf.first_k_dense_replace) for layer in range(hf.num_hidden_layers)]
    sizes = {"experts": hf.n_routed_experts, "topk": hf.num_experts_per_tok, "ffn_size": hf.moe_intermediate_size}
    shared = {"moe_shared_expert_intermediate_size": hf.moe_intermediate_size * hf.n_shared_experts}
    return {**mixture_fields(hf, **sizes, layers=layers, normalised=False), **shared}


def check_fields(hf: HfConfig, wanted: Mapping[str, Any]) -> None:
    """Refuse a config in which one of these fields is there and is another.

    Raises:
        ModelError: with the field, what it is and what it should be.
    """
    for name, value in wanted.items():
        given = getattr(hf, name, None)
        if given is not None and given != value:
            raise ModelError(f"{name} is {given!r} in this {hf.model_type} config, wanted {value!r}; this variant is not supported")
