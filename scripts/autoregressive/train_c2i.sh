#!/usr/bin/env bash
# Trains a class-conditional GPT; all flags are passed on, the machine is described by variables (scripts/launch.sh).
#   nproc_per_node=8 bash scripts/autoregressive/train_c2i.sh --code-path CODES --gpt-model GPT-L
#   nnodes=2 node_rank=0 master_addr=HOST nproc_per_node=8 bash scripts/autoregressive/train_c2i.sh ...     (on each machine, its node_rank)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch autoregressive/train/train_c2i.py "$@"
