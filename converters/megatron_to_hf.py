"""A Megatron checkpoint (torch_dist) to a Hugging Face directory, written by every rank, without the original repository.

    python converters/megatron_to_hf.py --model IN --output OUT
    torchrun --nproc_per_node 2 converters/megatron_to_hf.py --model IN --output OUT --tensor_model_parallel_size 2 --resume true

The layout need not be the one that wrote the checkpoint. The same as mswift export --to_hf true.
"""

from __future__ import annotations

from mswift.cli import program

if __name__ == "__main__":
    raise SystemExit(program(__doc__ or "", ["export", "--to_hf", "true"]))
