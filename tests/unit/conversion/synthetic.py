"""A model of random tensors for the conversion tests: HF tensors, rules, and the megatron tensors made by hand, without the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mswift.conversion.load import LocalParameter
from mswift.conversion.rules import AnyRule, Drop, FusedGateUp, FusedQKV, PaddedRows, Rename, TiedHead
from mswift.conversion.safetensors_io import save_file
from mswift.conversion.shards import Shard

Tensors = dict[str, torch.Tensor]
PARTITION = {"word_embeddings": 0, "output_layer": 0, "linear_qkv": 0, "linear_proj": 1, "linear_fc1": 0, "linear_fc2": 1}


@dataclass(frozen=True)
class Model:
    """Sizes without a common factor where the layout allows; 48 rows of qkv cut a group of 16 on 4 ranks."""

    hidden: int = 12
    ffn: int = 20
    groups: int = 3
    heads_per_group: int = 2
    head_dim: int = 4
    vocab: int = 37
    padded: int = 40
    layers: int = 3
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16

    def tensors(self, seed: int = 0) -> Tensors:
        """All HF tensors, every value random."""
        generator = torch.Generator().manual_seed(seed)
        q, kv = self.groups * self.heads_per_group * self.head_dim, self.groups * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            own = {
                "input_layernorm.weight": (self.hidden,),
                "post_attention_layernorm.weight": (self.hidden,),
                "self_attn.q_proj.weight": (q, self.hidden),
                "self_attn.k_proj.weight": (kv, self.hidden),
                "self_attn.v_proj.weight": (kv, self.hidden),
                "self_attn.q_proj.bias": (q,),
                "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.bias": (kv,),
                "self_attn.o_proj.weight": (self.hidden, q),
                "mlp.gate_proj.weight": (self.ffn, self.hidden),
                "mlp.up_proj.weight": (self.ffn, self.hidden),
                "mlp.down_proj.weight": (self.hidden, self.ffn),
            }
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
        return {name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in shapes.items()}

    def rules(self) -> tuple[AnyRule, ...]:
        rules: list[AnyRule] = [
            PaddedRows("embedding.word_embeddings.weight", "model.embed_tokens.weight", self.vocab, self.padded),
            Rename("decoder.final_layernorm.weight", "model.norm.weight"),
            Drop(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a buffer made from the config"),
        ]
        if self.tied:
            rules.append(TiedHead("output_layer.weight", "model.embed_tokens.weight", self.vocab, self.padded))
            rules.append(Drop(r"lm_head\.weight", "tied to the embedding", equals="model.embed_tokens.weight"))
        else:
            rules.append(PaddedRows("output_layer.weight", "lm_head.weight", self.vocab, self.padded))
        for layer in range(self.layers):
            to, of = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            sizes = (self.groups, self.heads_per_group, self.head_dim)
            for kind in ("weight", "bias"):
                qkv = [f"{of}self_attn.{name}_proj.{kind}" for name in "qkv"]
                rules.append(FusedQKV(f"{to}self_attention.linear_qkv.{kind}", qkv[0], qkv[1], qkv[2], *sizes))
            rules += [
                Rename(f"{to}input_layernorm.weight", f"{of}input_layernorm.weight"),
                Rename(f"{to}pre_mlp_layernorm.weight", f"{of}post_attention_layernorm.weight"),
                Rename(f"{to}self_attention.linear_proj.weight", f"{of}self_attn.o_proj.weight"),
                FusedGateUp(f"{to}mlp.linear_fc1.weight", f"{of}mlp.gate_proj.weight", f"{of}mlp.up_proj.weight"),
                Rename(f"{to}mlp.linear_fc2.weight", f"{of}mlp.down_proj.weight"),
            ]
        return tuple(rules)

    def megatron(self, hf: Tensors, rank: int, size: int, stage: int = 0, num_stages: int = 1) -> Tensors:
        """One rank's tensors, made by hand: layers are dealt out in turn, embedding first, head last."""
        whole = {
            f"decoder.layers.{layer}.{name}": value for layer in range(self.layers) for name, value in self._layer(hf, layer, rank, size).items()
        }
        held = {name: value for name, value in whole.items() if int(name.split(".")[2]) % num_stages == stage}
        pad = torch.zeros(self.padded - self.vocab, self.hidden, dtype=self.dtype)
        if stage == 0:
            held["embedding.word_embeddings.weight"] = torch.cat([hf["model.embed_tokens.weight"], pad]).chunk(size)[rank]
        if stage == num_stages - 1:
            held["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
            if not self.tied or num_stages > 1:
                head = hf["model.embed_tokens.weight" if self.tied else "lm_head.weight"]
                held["output_layer.weight"] = torch.cat([head, pad]).chunk(size)[rank]
        return {name: value.clone() for name, value in held.items()}

    def _layer(self, hf: Tensors, layer: int, rank: int, size: int) -> Tensors:
        def get(name: str) -> torch.Tensor:
            return hf[f"model.layers.{layer}.{name}"]

        def fused(kind: str) -> torch.Tensor:
            q, k, v = (get(f"self_attn.{name}_proj.{kind}").split(self.head_dim) for name in "qkv")
            heads: list[torch.Tensor] = []
            for group in range(self.groups):
                heads += [*q[group * self.heads_per_group : (group + 1) * self.heads_per_group], k[group], v[group]]
            return torch.cat(heads).chunk(size)[rank]

        return {
            "input_layernorm.weight": get("input_layernorm.weight"),
            "self_attention.linear_qkv.weight": fused("weight"),
            "self_attention.linear_qkv.bias": fused("bias"),
            "self_attention.linear_proj.weight": get("self_attn.o_proj.weight").chunk(size, dim=1)[rank],
            "pre_mlp_layernorm.weight": get("post_attention_layernorm.weight"),
            "mlp.linear_fc1.weight": torch.cat([get(f"mlp.{name}_proj.weight").chunk(size)[rank] for name in ("gate", "up")]),
            "mlp.linear_fc2.weight": get("mlp.down_proj.weight").chunk(size, dim=1)[rank],
        }


def local_parameters(
    tensors: Tensors, rank: int, size: int, fill: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone
) -> list[LocalParameter]:
    """As a megatron model would give them; ``fill`` makes the tensor, such as `torch.zeros_like`."""
    dims = {name: next((dim for part, dim in PARTITION.items() if f"{part}." in name), None) for name in tensors}
    return [LocalParameter(name, fill(tensor), Shard(dims[name], rank, size)) for name, tensor in tensors.items()]


def write_checkpoint(directory: Path, tensors: Tensors) -> Path:
    """An HF directory of two files and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for filename, held in parts.items():
        save_file(directory / filename, {name: tensors[name] for name in held})
    weight_map = {name: filename for filename, held in parts.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def equal_bits(ours: Tensors, theirs: Tensors) -> bool:
    """Same names, types and bytes."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and ours[name].shape == theirs[name].shape
        and torch.equal(ours[name].contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8))
        for name in ours
    )
