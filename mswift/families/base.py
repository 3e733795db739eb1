"""A family is data: how a Hugging Face config becomes a megatron one, and which tensor becomes which.

Importing the families needs no torch, so that an architecture that none of them covers is told at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mswift.conversion.rules import AnyRule
from mswift.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

HfConfig = Any
"""A transformers PretrainedConfig."""
DTYPES = ("bfloat16", "float32")
"""What weights are held in."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Sizes that a tensor-parallel layout rounds up; what is added is zero, stays zero in training and is cut off on export.

    A query group of zeros is exact: its values are zero, so its output is, and so are the gradients of all that it touches.

    Args:
        vocab: rows of the embedding and the head. groups: query groups (key and value heads), each with its query heads.
    """

    vocab: int
    groups: int


@dataclass(frozen=True, slots=True)
class NormStyle:
    """A norm: root mean square or centred (``layer``); whether its weight is stored around zero; whether it has a bias."""

    kind: Literal["rms", "layer"] = "rms"
    zero_centred: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Rotation:
    """One kind of rotary positions.

    Args:
        inv_freq_of: length of the sequence in tokens -> inverse frequencies fp32 ``[rotary dim / 2]``. factor: on cosine and sine.
        limit: length beyond which the frequencies are others; None: they never change. continuous: beyond it they differ from length to length.
    """

    inv_freq_of: Callable[[int], torch.Tensor]
    factor: float = 1.0
    limit: int | None = None
    continuous: bool = False

    def variant(self, length: int) -> int:
        """Equal for two lengths that have the same frequencies; 0 within the limit."""
        if self.limit is None or length <= self.limit:
            return 0
        return length if self.continuous else self.limit


@dataclass(frozen=True, slots=True)
class LatentStyle:
    """Multi-head latent attention: queries, and keys with values, pass through a narrow layer and a norm of its own before they become heads.

    Args:
        q_rank, kv_rank: width of the narrow layers; `q_rank` None: queries come straight from the hidden states.
        plain, rotated: columns of a head of queries and keys without and with a rotation; all heads share the rotated columns of the keys.
        values: columns of a head of values. bias: the narrow layers have one. epsilon: of their norms, which do not heed the config's.
    """

    q_rank: int | None
    kv_rank: int
    plain: int
    rotated: int
    values: int
    bias: bool = False
    epsilon: float = 1e-6

    @property
    def narrow(self) -> tuple[int, ...]:
        """Columns of the narrow layers, which tensor-parallel ranks share."""
        keys = self.kv_rank + self.rotated
        return (keys,) if self.q_rank is None else (self.q_rank, keys)


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """How a router chooses experts and weighs them, where megatron-core's own has no exact form for it.

    Args:
        groups, chosen_groups: experts are equal groups in order, and only those of the best groups can be chosen.
        judged_by: a group's worth is the sum of so many of its best scores. normalised: the weights of the chosen experts sum to 1.
    """

    groups: int = 1
    chosen_groups: int = 1
    judged_by: int = 1
    normalised: bool = True


@dataclass(frozen=True)
class AttentionStyle:
    """What a family's attention does that megatron-core's configuration does not say.

    Args:
        rotations: the kinds in use. rotation_of_layer: for every layer an index into them; None: no rotary positions there.
        interleaved: pairs of neighbouring columns are rotated rather than halves.
        head_norm: of queries and keys: None, ``shared`` (one weight for all heads), ``own`` (a weight for each head), ``full`` (over all heads)
            or ``rotated`` (of each head without a weight, behind the rotation, in layers that have one).
        norm: kind of that norm. norm_last: queries and keys are rotated first, then normalised. sinks: each head has a learnt score that takes
            part in the softmax and has no value. softcap: limit on the scores, by tanh. query_factor: positions int64 -> factors on the queries.
        factor_of_layer: in which layers; None: in all. chunk_of_layer: a query sees its own chunk of so many tokens (None: all) in every layer.
        latent: sizes of multi-head latent attention; None: plain heads.
    """

    rotations: tuple[Rotation, ...]
    rotation_of_layer: tuple[int | None, ...]
    interleaved: bool = False
    head_norm: Literal["shared", "own", "full", "rotated"] | None = None
    norm: NormStyle = NormStyle()
    norm_last: bool = False
    sinks: bool = False
    softcap: float | None = None
    query_factor: Callable[[torch.Tensor], torch.Tensor] | None = None
    factor_of_layer: tuple[bool, ...] | None = None
    chunk_of_layer: tuple[int | None, ...] | None = None
    latent: LatentStyle | None = None


@dataclass(frozen=True, slots=True)
class RouterStyle:
    """What a family's router does that megatron-core's configuration does not say.

    Args:
        kind: ``topk`` as megatron has it; ``corrected_softmax``: a bias is added to the softmax for the choice alone; ``sparsemixer``: two
            experts, each weighed among those near it.
        bias: on the logits. wide: the weight is held in fp32 whatever the model is held in.
        floor: least sum that corrected weights are divided by. jitter: half the relative distance that counts as near.
    """

    kind: Literal["topk", "corrected_softmax", "sparsemixer"] = "topk"
    bias: bool = False
    wide: bool = False
    floor: float = 0.0
    jitter: float = 0.0


@dataclass(frozen=True)
class MegatronDescription:
    """What megatron-core and our modules have to be told to build one model.

    Args:
        transformer: fields of TransformerConfig. vocab_size: without padding. max_sequence_length: in tokens.
        tied: the output head is the embedding. attention: what TransformerConfig does not say of it.
        output_bias: attention's output projection has a bias. mlp_bias: both MLP layers have one. expert_bias: those of routed experts have.
        head_bias: the output head has one. router: of mixtures of experts.
        norm: before the sublayers and at the end. pre_norms, post_norms: whether sublayers have a norm on their input, on their output.
        parallel: attention and MLP read the same input and are added together. residual_scale: factor on each sublayer's output.
        embedding_scale: factor on the embedding. logit_scale, logit_softcap: factor on the logits, then their limit by tanh.
        choice: how experts are chosen; None: as megatron-core's router does. further_layers: layers behind the last one that predict tokens
            further ahead, of which config.json tells. built_further: how many of them the model has; see `with_further`.
    """

    transformer: dict[str, Any]
    vocab_size: int
    max_sequence_length: int
    tied: bool
    attention: AttentionStyle
    output_bias: bool = False
    mlp_bias: bool = False
    expert_bias: bool = False
    head_bias: bool = False
    router: RouterStyle = RouterStyle()
    norm: NormStyle = NormStyle()
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    choice: ExpertChoice | None = None
    further_layers: int = 0
    built_further: int = 0

    def with_further(self, count: int) -> MegatronDescription:
        """The same with `count` layers that predict further ahead, each of the kind of the last layer, but never a delta net."""

        def longer(pattern: Any, kind: int | None = None) -> Any:
            if pattern is None or isinstance(pattern, int):
                return pattern
            return type(pattern)([*pattern, *[pattern[-1] if kind is None else kind] * count])

        kinds = {"moe_layer_freq": None, "linear_attention_freq": 0, "window_attn_skip_freq": None}
        patterns = {name: longer(self.transformer[name], kind) for name, kind in kinds.items() if name in self.transformer}
        style = self.attention
        attention = replace(
            style,
            rotation_of_layer=longer(style.rotation_of_layer),
            factor_of_layer=longer(style.factor_of_layer),
            chunk_of_layer=longer(style.chunk_of_layer),
        )
        return replace(self, transformer={**self.transformer, **patterns}, attention=attention, built_further=count) if count else self

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is a mixture of experts."""
        return bool(self.transformer.get("num_moe_experts") and self.transformer["moe_layer_freq"][layer])

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has a gated delta net in the place of attention."""
        kinds = self.transformer.get("linear_attention_freq")
        return bool(kinds and kinds[layer])

    @property
    def has_recurrent_layers(self) -> bool:
        return any(self.is_recurrent(layer) for layer in range(self.transformer["num_layers"]))

    @property
    def corrects_choice(self) -> bool:
        """Whether routers have a bias for the choice of experts alone."""
        return bool(self.transformer.get("moe_router_enable_expert_bias")) or self.router.kind == "corrected_softmax"

    @property
    def heads_per_group(self) -> int:
        return self.transformer["num_attention_heads"] // self.transformer["num_query_groups"]

    def padding(self, tp: int) -> Padding:
        """The sizes that `tp` ranks can share evenly: a multiple of 8 tokens on each, and whole query groups or whole shares of one."""
        multiple = 8 * tp
        groups, heads = self.transformer["num_query_groups"], self.transformer["num_attention_heads"]
        even = heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)
        return Padding(
            vocab=-(-self.vocab_size // multiple) * multiple,
            groups=groups if even else -(-groups // tp) * tp,
        )


@dataclass(frozen=True)
class ModelFamily:
    """One architecture family.

    Args:
        name: short name, such as ``qwen2``. architectures: values of ``architectures`` in config.json.
        describe: Hugging Face config -> megatron description; raises ModelError for what it cannot express exactly.
        rules: (Hugging Face config, padding of the layout) -> one rule for every tensor.
        further_rules: (Hugging Face config, padding, how many) -> the rules of the layers that predict further ahead; None: they cannot be loaded.
        count_further: (Hugging Face config, names of a checkpoint's tensors) -> how many of them it has.
        holders: values of ``architectures`` of larger models whose text part it is.
        limits: variants of it, and settings, that are refused or do not work; for docs/models.md.
        model_types: pairs of a ``model_type`` that transformers does not know and the one whose config class reads such a config.json.
    """

    name: str
    architectures: tuple[str, ...]
    describe: Callable[[HfConfig], MegatronDescription]
    rules: Callable[[HfConfig, Padding], tuple[AnyRule, ...]]
    further_rules: Callable[[HfConfig, Padding, int], tuple[AnyRule, ...]] | None = None
    count_further: Callable[[HfConfig, Iterable[str]], int] = lambda _hf, _tensors: 0
    model_types: tuple[tuple[str, str], ...] = ()
    limits: str = ""
    holders: tuple[str, ...] = ()


_FAMILIES: dict[str, ModelFamily] = {}
_HOLDERS: dict[str, ModelFamily] = {}


def register(family: ModelFamily) -> ModelFamily:
    for architecture in family.architectures:
        _FAMILIES[architecture] = family
    for architecture in family.holders:
        _HOLDERS[architecture] = family
    return family


def families() -> tuple[ModelFamily, ...]:
    """Every registered family, by name."""
    return tuple(sorted(set(_FAMILIES.values()), key=lambda family: family.name))


def text_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json as that of a text model: of one with a vision tower, what it says of its text part.

    Raises:
        ModelError: it should have a text part and says nothing of it.
    """
    names = raw.get("architectures")
    holder = next((name for name in names if isinstance(name, str) and name in _HOLDERS), None) if isinstance(names, list) else None
    if holder is None:
        return dict(raw)
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(f"{where}: a config.json of {holder} without a text_config; download it again")
    shared = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "transformers_version")
    outer = {name: raw[name] for name in shared if name in raw}
    return {**text, **outer, "architectures": [_HOLDERS[holder].architectures[0]]}


def find_family(architectures: object, where: str) -> ModelFamily:
    """The family of a checkpoint.

    Args:
        architectures: the entry of its config.json.

    Raises:
        ModelError: none fits; the nearest supported architecture is named.
    """
    names = architectures if isinstance(architectures, list) and all(isinstance(name, str) for name in architectures) else []
    for name in names:
        if name in _FAMILIES:
            return _FAMILIES[name]
    known = sorted({*_FAMILIES, *_HOLDERS})
    if not names:
        raise ModelError(f"{where}: config.json has architectures {architectures!r}, wanted a list with one, such as {known[-1]}; mend it")
    nearest = difflib.get_close_matches(names[0], known, n=1, cutoff=0.0)
    raise ModelError(
        f"{where}: architecture {', '.join(names)} is not supported; nearest supported: {nearest[0]}; take that, or another of the {len(known)} "
        "that docs/models.md lists"
    )


def choose_dtype(wanted: str | None, own: object, where: str) -> str:
    """The dtype to hold a checkpoint in: the wanted one, else its own.

    Args:
        own: the entry of its config, or None.

    Raises:
        ConfigError: anything but `DTYPES`; half precision is trained in neither engine.
    """
    name = wanted or str(own or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"{where} is in {name}, wanted {' or '.join(DTYPES)}; give --torch_dtype to hold it in one of them")
    return name
