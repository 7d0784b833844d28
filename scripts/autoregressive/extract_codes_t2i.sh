#!/usr/bin/env bash
# Extracts codes on nproc_per_node processes of this machine; all flags are passed on.
#   nproc_per_node=8 bash scripts/autoregressive/extract_codes_t2i.sh --vq-ckpt VQ.pt --data-path LISTS --code-path CODES
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
set -x
exec torchrun \
  --nnodes=1 --nproc_per_node="${nproc_per_node:-8}" --node_rank=0 --master_port="${master_port:-12336}" \
  autoregressive/train/extract_codes_t2i.py "$@"
