#!/usr/bin/env bash
# Trains a tokenizer; all flags are passed on, the machine is described by variables (scripts/launch.sh).
#   nproc_per_node=8 bash scripts/tokenizer/train_vq.sh --data-path IMAGES
#   nnodes=2 node_rank=0 master_addr=HOST nproc_per_node=8 bash scripts/tokenizer/train_vq.sh ...     (on each machine, its node_rank)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch tokenizer/tokenizer_image/vq_train.py "$@"
