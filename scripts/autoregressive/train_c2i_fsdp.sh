#!/usr/bin/env bash
# Trains a large GPT with sharded weights (FSDP2); all flags are passed on, the machine is described by variables
# (scripts/launch.sh). scripts/slurm/train.sbatch starts it on a cluster.
#   nproc_per_node=8 bash scripts/autoregressive/train_c2i_fsdp.sh --code-path CODES --image-size 384 --gpt-model GPT-3B
#   nnodes=2 node_rank=0 master_addr=HOST nproc_per_node=8 bash scripts/autoregressive/train_c2i_fsdp.sh ...     (on each machine, its node_rank)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch autoregressive/train/train_c2i_fsdp.py "$@"
