#!/usr/bin/env bash
# Runs tokenizer/tokenizer_image/vq_train.py on nproc_per_node processes of each of nnodes machines; all flags are passed on.
#   nproc_per_node=8 bash scripts/tokenizer/train_vq.sh --flags
#   nnodes=2 node_rank=0 master_addr=HOST nproc_per_node=8 bash scripts/tokenizer/train_vq.sh --flags     (on each machine, its node_rank)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
set -x
exec torchrun \
  --nnodes="${nnodes:-1}" --nproc_per_node="${nproc_per_node:-1}" --node_rank="${node_rank:-0}" \
  --master_addr="${master_addr:-127.0.0.1}" --master_port="${master_port:-29500}" \
  tokenizer/tokenizer_image/vq_train.py "$@"
