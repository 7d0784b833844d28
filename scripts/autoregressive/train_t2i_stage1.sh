#!/usr/bin/env bash
# First stage of the text-conditional GPT: 256 pixels, short captions; repeat a flag to override it. The published model
# is --gpt-model GPT-XL. Variables describe the machine (scripts/launch.sh).
#   nproc_per_node=8 bash scripts/autoregressive/train_t2i_stage1.sh --data-path LISTS --t5-feat-path FEATURES --gpt-model GPT-XL
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch autoregressive/train/train_t2i.py --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt --image-size 256 \
  --data-path /path/to/laion_coco50M --t5-feat-path /path/to/laion_coco50M_flan_t5_xl "$@"
