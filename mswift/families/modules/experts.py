"""All experts of a rank together: each of the two linear layers is one call for all of them, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from mswift.families.modules.mixture import BiasedExpertRowLinear
from mswift.families.modules.mlp import gate_of
from mswift.kernels.elementwise import gated_activation
from mswift.kernels.grouped_linear import grouped_linear

Linear: TypeAlias = ColumnParallelLinear | RowParallelLinear


class ExpertLayers:
    """What is known of one linear layer of all experts; what wraps these layers puts another in its place."""

    def base(self, module: nn.Module) -> Linear:
        """megatron's linear layer in `module`."""
        assert isinstance(module, ColumnParallelLinear | RowParallelLinear)
        return module

    def product(self, modules: Sequence[nn.Module], x: Tensor, counts: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
        """`x` ``[rows, in]``, sorted by expert, `counts` int64 ``[experts]`` -> ``[rows, out]``."""
        return grouped_linear(x, [self.base(module).weight for module in modules], counts, biases)


class GroupedExperts(SequentialMLP):
    """megatron's experts one after another, computed together; parameters, checkpoints and names are the same.

    Nothing is sent inside experts: whoever brings tokens to them and back adds up the parts of tensor-parallel ranks.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_local_experts, config, *args, **kwargs)
        self.layers = ExpertLayers()
        self.gate = gate_of(config)

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[rows, hidden]``, sorted by expert -> (the same, times the weight of each row; None)."""
        x, weights = permuted_local_hidden_states, permuted_probs[:, None]
        if self.num_local_experts == 1 or self.config.use_te_activation_func or self.config.bias_activation_fusion:
            return super().forward(x, tokens_per_expert, permuted_probs)
        counts = torch.as_tensor(tokens_per_expert, dtype=torch.int64)
        if self.config.moe_apply_probs_on_input:
            x, weights = (weights * x).to(x.dtype), torch.ones_like(weights)
        first, second = zip(*((expert.linear_fc1, expert.linear_fc2) for expert in self.local_experts))
        both = self.layers.product(first, x, counts, self._biases(first))
        activated = (self._activate(both) * weights).to(x.dtype)
        output = self.layers.product(second, activated, counts, None)
        biases = self._biases(second)
        if biases is None:
            return output, None
        of_rows = torch.repeat_interleave(torch.stack(biases), counts.to(x.device), dim=0, output_size=len(x))
        if isinstance(self.layers.base(second[0]), BiasedExpertRowLinear) and self.tp_group.rank() > 0:
            of_rows = of_rows * 0.0  # the first of the ranks that share an expert adds it
        return (output + of_rows * weights).to(output.dtype), None

    def _biases(self, modules: Sequence[nn.Module]) -> list[Tensor] | None:
        biases = [self.layers.base(module).bias for module in modules]
        return None if biases[0] is None else biases

    def _activate(self, both: Tensor) -> Tensor:
        config = self.config
        if not config.gated_linear_unit:
            return config.activation_func(both)
        if self.gate is not None:
            return gated_activation(both, self.gate)
        gate, up = both.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return config.activation_func(gate) * (up + config.glu_linear_offset)
