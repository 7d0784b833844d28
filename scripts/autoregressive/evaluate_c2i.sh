#!/usr/bin/env bash
# From a checkpoint to a row of results/c2i.csv and .md: draws 50,000 pictures, measures them, notes everything.
#   nproc_per_node=8 bash scripts/autoregressive/evaluate_c2i.sh --reference VIRTUAL_imagenet256_labeled.npz \
#     --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 --cfg-scale 2.0
# All flags are passed on: those of sample_c2i_ddp.py, --reference, --features, --weights, --table.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12348
launch autoregressive/sample/evaluate_c2i.py --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "$@"
