"""Which layers get an adapter: what the names of ``--target_modules`` mean, and the report of what got one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

from mswift.errors import ConfigError

ROUTED = ".experts."
"""In the name of every module of a routed expert."""
EXPERTS = "experts."
"""Before the kind of a module of a routed expert."""
EXPERT_LINEAR = (f"{EXPERTS}linear_fc1", f"{EXPERTS}linear_fc2")
ALL_LINEAR = (
    *("linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"),
    *("linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2", *EXPERT_LINEAR, "shared_expert_gate"),
)
"""Kinds of modules that ``all-linear`` stands for: every linear layer of a block, those of routed experts too."""
ROUTER, EMBEDDING, HEAD = "router", "word_embeddings", "output_layer"
ADAPTABLE = (*ALL_LINEAR, ROUTER, EMBEDDING, HEAD)
WITHOUT_DORA = (*EXPERT_LINEAR, ROUTER)
"""Kinds for which there is no DoRA: peft has none for parameters, which those of all experts and of routers are in transformers."""
GATE_WEIGHT = "gate_weight"

SPECIAL = {"all-linear": ALL_LINEAR, "all-router": (ROUTER,), "all-embedding": (EMBEDDING,), "experts": EXPERT_LINEAR}
"""Names for several kinds at once."""
HF_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "linear_q_proj": (("q_proj",),),
    "linear_q_down_proj": (("q_a_proj",),),
    "linear_q_up_proj": (("q_b_proj",),),
    "linear_kv_down_proj": (("kv_a_proj_with_mqa",),),
    "linear_kv_up_proj": (("kv_b_proj",),),
    "linear_qkv": (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "linear_proj": (("o_proj",),),
    "in_proj": (("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
    "out_proj": (("out_proj",),),
    "linear_fc1": (("gate_proj", "up_proj"), ("gate_up_proj",), ("c_fc",), ("w1", "w3")),
    "linear_fc2": (("down_proj",), ("c_proj",), ("w2",)),
    ROUTER: (("gate",),),
    EMBEDDING: (("embed_tokens",),),
    HEAD: (("lm_head",),),
}
"""Megatron module -> the Hugging Face modules that it stands for, in each of the forms that families write them in."""


def kind_of(module: str) -> str:
    """The kind of a module by its name: one of `ADAPTABLE` if it can have an adapter; routed experts are kinds of their own."""
    leaf = module.rpartition(".")[2]
    if leaf == GATE_WEIGHT:
        return "shared_expert_gate"
    return EXPERTS + leaf if ROUTED in module else leaf


def _with_experts(target: str) -> tuple[str, ...]:
    return (target, EXPERTS + target) if EXPERTS + target in EXPERT_LINEAR else (target,)


def resolve_targets(names: list[str] | tuple[str, ...], own: Collection[str], *, use_dora: bool = False) -> tuple[str, ...]:
    """Kinds of modules for the names of `SPECIAL`, Hugging Face names (``q_proj``) or megatron names (``linear_qkv``).

    Args:
        own: those of `ADAPTABLE` that the model has. use_dora: ``all-linear`` leaves out what has no DoRA.

    Raises:
        ConfigError: an unknown name, a part of a fused layer without the other parts, or one without DoRA.
    """
    wanted = set(names)
    kinds = tuple(kind for kind in ADAPTABLE if kind in own)
    known_here = tuple(dict.fromkeys(kind.removeprefix(EXPERTS) for kind in kinds))
    fused = {part: (target, set(parts)) for target in known_here if target in HF_PARTS for parts in HF_PARTS[target] for part in parts}
    found: set[str] = set()
    for name in wanted:
        if name in SPECIAL and set(SPECIAL[name]) & set(kinds):
            found |= {kind for kind in SPECIAL[name] if not (use_dora and name == "all-linear" and kind in WITHOUT_DORA)}
            continue
        target, parts = fused.get(name, (name, {name}))
        if target not in known_here:
            raise ConfigError(f"--target_modules: got {name!r}, wanted {_wanted(name, fused, kinds)}")
        found |= set(_with_experts(target))
        missing = parts - wanted
        if missing and target not in wanted:
            raise ConfigError(
                f"--target_modules: {', '.join(sorted(wanted & parts))} is one layer with {', '.join(sorted(missing))} on the Megatron engine; "
                "name all of them"
            )
    chosen = tuple(kind for kind in kinds if kind in found)
    check_dora(chosen, use_dora)
    return chosen


def _wanted(name: str, fused: Iterable[str], kinds: Iterable[str]) -> str:
    if name in ("lm_head", HEAD):
        return "a model with a head of its own: that of this one is its embedding; leave the name out"
    special = [special for special, meant in SPECIAL.items() if set(meant) & set(kinds)]
    return f"one of {', '.join([*special, *fused, *(kind for kind in kinds if not kind.startswith(EXPERTS))])}"


def check_dora(kinds: Iterable[str], use_dora: bool) -> None:
    """Refuse DoRA on modules for which there is none.

    Raises:
        ConfigError: with their kinds.
    """
    without = [kind for kind in kinds if kind in WITHOUT_DORA]
    if use_dora and without:
        raise ConfigError(f"--use_dora true is not done on {', '.join(without)}; leave these out of --target_modules, or train plain LoRA")


def coverage(adapted: Iterable[str], modules: Iterable[str]) -> str:
    """One line: on how many modules of each kind there is an adapter, and on which kinds there is none.

    Args:
        adapted: names in the whole model. modules: those of everything that could have an adapter.
    """
    have, all_of = (Counter(map(kind_of, names)) for names in (adapted, modules))
    order = [kind for kind in ADAPTABLE if kind in all_of]
    some = [f"{have[kind]}{f' of {all_of[kind]}' if have[kind] < all_of[kind] else ''} {kind}" for kind in order if have[kind]]
    none = [f"{all_of[kind]} {kind}" for kind in order if not have[kind]]
    return f"adapters on {', '.join(some) or 'nothing'}" + (f"; none on {', '.join(none)}" if none else "")


def adaptable(weight: str) -> str | None:
    """The module that a weight of this name belongs to, if that can have an adapter; for the gate of a shared expert its own name."""
    if weight.endswith(f".{GATE_WEIGHT}"):
        return weight
    module = re.sub(r"\.weight$", "", weight)
    return module if module != weight and kind_of(module) in ADAPTABLE else None
