"""megatron's MLP, its activation in one pass where both halves of a gated one are there to be taken together."""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from mswift.families.gpt_oss import sigmoid_gate
from mswift.kernels import choice
from mswift.kernels.elementwise import GELU_TANH, SILU, Gate, gated_activation


class GatedMLP(MLP):
    """As megatron's; checkpoints and names are the same."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.gate = gate_of(config)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``[s, b, hidden]`` -> (the same, the bias of the second product)."""
        if self.gate is None or per_token_scale is not None or not choice.compiled("gated_activation", hidden_states):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        both, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(gated_activation(both if bias is None else both + bias, self.gate))


def gate_of(config: TransformerConfig) -> Gate | None:
    """None: another activation than those that the kernel knows."""
    function: Any = config.activation_func
    if not config.gated_linear_unit:
        return None
    if isinstance(function, functools.partial) and function.func is sigmoid_gate:
        limit = config.activation_func_clamp_value
        return Gate(slope=function.args[0], limit=float("inf") if limit is None else limit, offset=config.glu_linear_offset)
    if config.activation_func_clamp_value is not None or config.glu_linear_offset:
        return None
    if function is F.silu:
        return SILU
    tanh = isinstance(function, functools.partial) and function.func is F.gelu and function.keywords == {"approximate": "tanh"}
    return GELU_TANH if tanh else None


def gated_mlp(submodules: MLPSubmodules, tp_group: dist.ProcessGroup) -> type[GatedMLP]:
    """A class that needs nothing but a config: what else a layer hands on depends on megatron's version and on the classes that it knows by name."""

    class _Bound(GatedMLP):
        def __init__(self, config: TransformerConfig, **_handed: Any) -> None:
            super().__init__(config, submodules, tp_group=tp_group)

    return _Bound
