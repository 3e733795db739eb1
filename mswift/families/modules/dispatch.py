"""Tokens to their experts and back: megatron-core's mixture, whose rows the kernels move where there are some for the device."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from mswift.kernels import choice
from mswift.kernels.permute import NAME, permute, unpermute


class RowDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron's own, which still decides what goes where: it is asked by one column of the tokens, and whole rows follow by `permute`.

    They come back summed in fp32 and in a fixed order, where megatron adds to bf16 in any.
    """

    places: Tensor | None = None
    """int64 ``[tokens, experts of a token]``, where each row went; None: megatron moves rows itself."""

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.places = None
        if not self._moves_rows(hidden_states):
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        _, of_rows = super().dispatch_preprocess(hidden_states[..., :1], routing_map, probs)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.hidden_shape, self.hidden_shape_before_permute = hidden_states.shape, tokens.shape
        source = self.reversed_local_input_permutation_mapping  # the token of each row
        self.places = source.argsort(stable=True).view(len(tokens), -1)
        return permute(tokens, self.places, len(source)), of_rows

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        if self.places is None:
            return super().combine_postprocess(permutated_local_input_tokens)
        return unpermute(permutated_local_input_tokens, self.places).view(self.hidden_shape)

    def _moves_rows(self, hidden_states: Tensor) -> bool:
        """Where every token goes to as many experts, and a kernel takes it."""
        config = self.config
        as_many = config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization
        return as_many and self.shared_experts is None and choice.compiled(NAME, hidden_states)


def mixture_layer(submodules: MoESubmodules, collection: ProcessGroupCollection) -> type[MoELayer]:
    """A class that needs nothing but a config, as `gated_mlp` is one."""

    class _Bound(MoELayer):
        token_dispatcher: Any

        def __init__(self, config: TransformerConfig, **_handed: Any) -> None:
            super().__init__(config, submodules, pg_collection=collection)
            if type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher and not self.shared_expert_overlap:
                places = (self.num_local_experts, self.local_expert_indices)
                self.token_dispatcher = RowDispatcher(*places, config=self.config, pg_collection=collection)

    return _Bound
