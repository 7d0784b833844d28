#!/usr/bin/env bash
# Draws a picture of each prompt of evaluations/t2i/PartiPrompts.tsv on all GPUs of this machine; repeat a flag to override it.
#   bash scripts/autoregressive/sample_t2i_parti.sh --gpt-ckpt pretrained_models/t2i_XL_stage1_256.pt --image-size 256
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12347
launch autoregressive/sample/sample_t2i_ddp.py --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt \
  --prompt-csv evaluations/t2i/PartiPrompts.tsv --sample-dir samples_parti "$@"
