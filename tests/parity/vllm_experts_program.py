"""What vLLM's own code takes out of an adapter. Run by the interpreter of vLLM's own environment, which has no mswift.

``python vllm_experts_program.py DIRECTORY OUT MODE ADAPTER ...`` opens the model, lets vLLM's manager of adapters wrap every layer that it can
adapt, and load and set each adapter; writes what then stands in the buffers of its layers to ``OUT/0.pt``, ``OUT/1.pt``, ... MODE: ``2d``, ``3d``
(as for models whose experts are one parameter), or ``mixed``, vLLM's own, in which an adapter named ``...3d`` is declared to be of that form.

The CPU build has no kernel that adds adapters of experts, so that their layers are made here without one; the reading, stacking, scaling and
setting of the factors need none and are vLLM's.
"""

import sys
from pathlib import Path

import torch
from vllm_program import open_model

RANK = 16


def without_kernel(kind: type) -> type:
    """vLLM's layer of adapted experts, which holds the buffers, on top of whatever computes the experts."""
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA

    class Buffers(kind):  # type: ignore[misc, valid-type]
        def __init__(self, base_layer: torch.nn.Module) -> None:
            BaseLayerWithLoRA.__init__(self)
            self.base_layer, self.moe_config = base_layer, base_layer.moe_config
            self.tp_size, self.tp_rank, self.device = 1, 0, torch.device("cpu")
            self._w13_slices = 1 if issubclass(kind, FusedMoE3DWithLoRA) else 2
            self.enable_moe_shared_loras = False

        def set_mapping(self, wrapper: object) -> None:
            self.punica_wrapper = wrapper

    return Buffers


PARTS = {True: ("w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b"), False: ("lora_a", "lora_b")}
"""What the layers of experts hold, and all others."""


def read(model: torch.nn.Module, config: object, adapters: list[str], out: Path) -> list[int]:
    """Write what each adapter leaves in the buffers of every layer; how many layers there are."""
    from vllm.lora import utils
    from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager

    kinds = {kind: without_kernel(kind) for kind in (FusedMoEWithLoRA, FusedMoE3DWithLoRA)}
    utils._all_lora_classes = tuple(kinds.get(kind, kind) for kind in utils._all_lora_classes)
    worker = WorkerLoRAManager(config, torch.device("cpu"), {})
    worker.create_lora_manager(model, config)
    manager = worker._adapter_manager
    for number, adapter in enumerate(adapters):
        worker.remove_all_adapters()
        worker._apply_adapters({LoRARequest("adapter", number + 1, adapter, is_3d_lora_weight=adapter.endswith("3d"))})
        manager.activate_adapter(number + 1)
        held = {}
        for name, module in manager.modules.items():
            stacks = {part: getattr(module, f"{part}_stacked") for part in PARTS[isinstance(module, FusedMoEWithLoRA)]}
            held[name] = {part: [stack[0].clone() for stack in ([each] if torch.is_tensor(each) else each)] for part, each in stacks.items()}
        torch.save(held, out / f"{number}.pt")
    return [len(manager.modules)]


def main(directory: str, out: str, mode: str, *adapters: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.config.lora import LoRAConfig

    llm = open_model(directory)
    config = llm.llm_engine.vllm_config
    settings = {"max_lora_rank": RANK, "max_loras": 1, "max_cpu_loras": 1, "lora_dtype": torch.float32}
    config.lora_config = LoRAConfig(**settings, enable_mixed_moe_lora_format=mode == "mixed")

    def run(model: torch.nn.Module) -> list[int]:
        model.is_3d_moe_weight = mode == "3d"
        return read(model, config, list(adapters), Path(out))

    with set_current_vllm_config(config):
        print(llm.apply_model(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
