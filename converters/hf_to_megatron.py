"""A Hugging Face checkpoint to a Megatron checkpoint (torch_dist), in parallel and in bounded memory.

    python converters/hf_to_megatron.py --model IN --output OUT
    torchrun --nproc_per_node 2 converters/hf_to_megatron.py --model IN --output OUT --tensor_model_parallel_size 2
    srun -n 8 python converters/hf_to_megatron.py --model IN --output OUT --expert_model_parallel_size 8 --resume true

Any layout may read what any other has written. --dry_run true only says what would be written. The same as mswift export --to_mcore true.
"""

from __future__ import annotations

from mswift.cli import program

if __name__ == "__main__":
    raise SystemExit(program(__doc__ or "", ["export", "--to_mcore", "true"]))
