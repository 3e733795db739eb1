"""Gated delta nets: linear attention whose memory is one matrix a head that decays and is corrected towards each new value.

megatron-core has such a module, under the same parameter names, but only over CUDA kernels of another library; this one is plain torch and
runs everywhere. Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, arXiv 2412.06464: equation 10, and the chunked form of section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mswift.errors import ConfigError
from mswift.families.modules.layers import BlockedColumnParallelLinear, split_blocks
from mswift.families.modules.packed import PackedRows
from mswift.runtime.precision import widen

CHUNK = 64
_EPSILON = 1e-6  # of the length of queries and keys
_BLOCKS = ("query", "key", "value", "z", "beta", "alpha")


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, row_of: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over a sequence, `CHUNK` tokens at a time: rows q, k, v, a matrix S:
    ``S <- exp(log_decay) S``, ``S <- S + k^T beta (v - k S)``, ``o = q S``.

    Inside a chunk all corrections are found together, by one triangular system; a chunk of one token is the rule itself. All are fp32.

    Args:
        query, key: ``[b, groups, 1, s, key dim]``, of whatever length they should have. value: ``[b, groups, heads of a group, s, value dim]``.
        log_decay, beta: ``[b, groups, heads of a group, s]``; log_decay is not positive.
        state: S before the first token, ``[b, groups, heads of a group, key dim, value dim]``.
        row_of: int64 ``[s]``, the row of each token where rows lie end to end: each but the first begins with an empty memory. None: one row.

    Returns:
        (o, like value; S after the last token).
    """
    length = value.shape[3]
    chunk = min(CHUNK, length)
    missing = -length % chunk
    query, key, value = (F.pad(part, (0, 0, 0, missing)).unflatten(3, (-1, chunk)) for part in (query, key, value))
    log_decay, beta = (F.pad(part, (0, missing)).unflatten(3, (-1, chunk)) for part in (log_decay, beta))
    total = log_decay.cumsum(-1)  # since before the chunk's first token
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=value.device).triu(1)
    since, until = total.exp(), (total[..., -1:] - total).exp()  # how much of what was there before the chunk; of a token, after the chunk
    through, hidden = since[..., -1], later
    if row_of is not None:
        hidden, fresh, forgotten, cut = _borders(row_of, chunk, later)
        since, until, through = since.masked_fill(fresh, 0.0), until.masked_fill(forgotten, 0.0), through.masked_fill(cut, 0.0)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    keys_before = (key @ key.mT) * between * beta[..., None]
    wanted = torch.cat((value, key * since[..., None]), dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(keys_before, wanted, upper=False, unitriangular=True)
    new, known = solved.split((value.shape[-1], key.shape[-1]), dim=-1)  # corrections of an empty state, and how much of a state they take away
    inside = (query @ key.mT) * between
    from_state, to_state = query * since[..., None], key * until[..., None]
    outputs = []
    for index in range(value.shape[3]):
        here = (..., index, slice(None), slice(None))
        corrections = new[here] - known[here] @ state
        outputs.append(from_state[here] @ state + inside[here] @ corrections)
        state = state * through[..., index, None, None] + to_state[here].mT @ corrections
    return torch.cat(outputs, dim=3)[..., :length, :], state


def _borders(row_of: Tensor, chunk: int, later: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What rows cut off in chunks ``[n, chunk]`` of tokens: which token hides from which (later ones too), which see nothing of before the
    chunk, which are forgotten by its end, and which chunks nothing passes through."""
    rows = torch.cat((row_of, row_of[-1:].expand(-len(row_of) % chunk))).view(-1, chunk)
    last = rows[:, -1]
    before = torch.cat((row_of[:1], last[:-1]))
    return later | (rows[:, :, None] != rows[:, None, :]), rows != before[:, None], rows != last[:, None], last != before


class CausalConvolution(nn.Module):
    """One short filter over time for each channel, then SiLU.

    Args:
        blocks: channels of each block on this rank, by name. kernel: tokens that a filter sees, the present one included.
    """

    def __init__(self, config: TransformerConfig, blocks: dict[str, int], kernel: int, group: Any) -> None:
        super().__init__()
        self.blocks, self.group = blocks, group
        self.weight = nn.Parameter(torch.empty(sum(blocks.values()), 1, kernel, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """`x` ``[b, channels, s]`` after `before` ``[b, channels, kernel - 1]`` -> (the same shape as x, what the next call has before it)."""
        x = torch.cat((before, x), dim=-1)
        return F.silu(F.conv1d(widen(x), widen(self.weight), groups=len(self.weight))), x[..., x.shape[-1] - before.shape[-1] :]

    def rows(self, x: Tensor, packed: PackedRows) -> Tensor:
        """`x` ``[1, channels, t]`` of rows that lie end to end; none sees what stands before it. Zeros are put between them for that."""
        gap = self.weight.shape[-1] - 1
        places = torch.arange(x.shape[2], device=x.device) + packed.row_of * gap
        wide = x.new_zeros(1, x.shape[1], x.shape[2] + len(packed.lengths) * gap).index_copy(2, places, x)
        return self(wide, x.new_zeros(1, x.shape[1], gap))[0].index_select(2, places)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        groups = {"tp_group": self.group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        sharded = make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets, **groups)
        return split_blocks(sharded, f"{prefix}weight", self.blocks)


class GatedNorm(nn.Module):
    """Root mean square of each head, its weight stored around one, times SiLU of a gate; fp32, rounded once.

    Every rank holds the whole weight and uses it on its own heads; the backward pass adds the parts of its gradient.
    """

    def __init__(self, config: TransformerConfig, size: int, group: Any) -> None:
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, group
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """fp32 `x`, `gate` ``[..., size]`` -> fp32 the same."""
        weight = copy_to_tensor_model_parallel_region(self.weight.float(), group=self.group)
        return F.rms_norm(x, weight.shape, weight, self.eps) * F.silu(gate.float())


class DeltaNet(MegatronModule):
    """A gated delta net in the place of self attention; sizes are those of TransformerConfig's ``linear_*`` fields.

    Heads are split over tensor-parallel ranks; every rank computes whole sequences.

    Raises:
        ConfigError: context parallelism.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: Any, **_: Any) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ConfigError(f"context parallelism {config.context_parallel_size} is not supported by gated delta nets; use 1")
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        tp = self.tp_group.size()
        self.groups, self.heads = (config.linear_num_key_heads or 0) // tp, (config.linear_num_value_heads or 0) // tp
        self.key_dim, self.value_dim = config.linear_key_head_dim or 0, config.linear_value_head_dim or 0
        self.kernel = config.linear_conv_kernel_dim or 0
        keys, values = self.groups * self.key_dim, self.heads * self.value_dim
        self.blocks = dict(zip(_BLOCKS, (keys, keys, values, values, self.heads, self.heads), strict=True))
        common: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": self.tp_group}
        rows = tp * sum(self.blocks.values())
        self.in_proj = BlockedColumnParallelLinear(config.hidden_size, rows, gather_output=False, skip_bias_add=False, blocks=self.blocks, **common)
        self.conv1d = CausalConvolution(config, {name: self.blocks[name] for name in _BLOCKS[:3]}, self.kernel, self.tp_group)
        self.dt_bias, self.A_log = (nn.Parameter(torch.empty(self.heads, dtype=config.params_dtype)) for _ in range(2))
        for parameter in (self.dt_bias, self.A_log):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.out_norm = GatedNorm(config, self.value_dim, self.tp_group)
        self.out_proj = RowParallelLinear(tp * values, config.hidden_size, input_is_parallel=True, skip_bias_add=True, **common)

    def forward(
        self, hidden_states: Tensor, *_: Any, inference_context: Any = None, packed_seq_params: PackedRows | None = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, hidden]`` -> (``[s, b, hidden]``, None); causal, so that padding on the right changes nothing before it."""
        projected, _bias = self.in_proj(hidden_states)
        projected = projected.transpose(0, 1)
        if inference_context is not None:
            projected = _without_padding(projected, inference_context)
        before, state = self._memory(projected, inference_context)
        *qkv, gate, beta, alpha = projected.split(list(self.blocks.values()), dim=-1)
        mixed = torch.cat(qkv, dim=-1).mT
        if packed_seq_params is None:
            mixed, before = self.conv1d(mixed, before)
        else:
            mixed = self.conv1d.rows(mixed, packed_seq_params)
        output, state = self._recall(mixed, beta, alpha, state, None if packed_seq_params is None else packed_seq_params.row_of)
        if inference_context is not None:
            inference_context.next_states[self.layer_number] = (before.clone(), state)  # not a view into all that was filtered
        output = self.out_norm(output, gate.unflatten(-1, (self.heads, self.value_dim)))
        return self.out_proj(output.flatten(2).transpose(0, 1).to(hidden_states.dtype))

    def _memory(self, projected: Tensor, inference_context: Any) -> tuple[Tensor, Tensor]:
        """What is remembered from before: the last inputs of the filters, and the state of each head in fp32."""
        known = None if inference_context is None else inference_context.states.get(self.layer_number)
        if known is not None:
            return known
        batch, channels = projected.shape[0], len(self.conv1d.weight)
        per_group = self.heads // self.groups
        state = projected.new_zeros(batch, self.groups, per_group, self.key_dim, self.value_dim, dtype=torch.float32)
        return projected.new_zeros(batch, channels, self.kernel - 1), state

    def _recall(self, mixed: Tensor, beta: Tensor, alpha: Tensor, state: Tensor, row_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The filtered queries, keys and values ``[b, channels, s]`` through the rule: fp32 ``[b, s, heads, value dim]``, and the new state."""
        channels = list(self.conv1d.blocks.values())
        per_group = self.heads // self.groups
        query, key, value = (part.float() for part in mixed.split(channels, dim=1))
        query, key = (_unit(part.unflatten(1, (self.groups, 1, self.key_dim)).mT) for part in (query, key))
        value = value.unflatten(1, (self.groups, per_group, self.value_dim)).mT
        decay = -self.A_log.float().exp() * F.softplus(alpha.float() + self.dt_bias.float())
        decay, beta = (part.mT.unflatten(1, (self.groups, per_group)) for part in (decay, beta.float().sigmoid()))
        output, state = delta_rule(query * self.key_dim**-0.5, key, value, decay, beta, state, row_of)
        return output.permute(0, 3, 1, 2, 4).flatten(2, 3), state

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        return {**sharded, **make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups)}


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPSILON)


def _without_padding(projected: Tensor, inference_context: Any) -> Tensor:
    """`projected` ``[b, s, rows]`` with zeros where a row of the batch has padding on its left, so that nothing of it is remembered."""
    padding, start = inference_context.left_padding, inference_context.sequence_len_offset
    if padding is None:
        return projected
    positions = torch.arange(start, start + projected.shape[1], device=projected.device)
    return projected.masked_fill((positions < padding[:, None])[..., None], 0.0)
