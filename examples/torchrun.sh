#!/usr/bin/env bash
# One machine with several GPUs, started by torchrun itself. The same in short: NPROC_PER_NODE=4 mswift sft examples/full.yaml
# Flags given to this script are passed on and win over those of the file: bash examples/torchrun.sh --model DIR --dataset rows.jsonl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec torchrun --standalone --nproc_per_node "${GPUS:-4}" -m mswift.cli sft examples/full.yaml "$@"
