#!/usr/bin/env bash
# Second stage of the text-conditional GPT: 512 pixels, long captions with short ones among them; repeat a flag to
# override it. It begins with the weights of the first stage: --init-from CHECKPOINT.
#   nproc_per_node=8 bash scripts/autoregressive/train_t2i_stage2.sh --init-from pretrained_models/t2i_XL_stage1_256.pt \
#     --data-path LISTS --t5-feat-path FEATURES --short-t5-feat-path SHORT_FEATURES --gpt-model GPT-XL
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch autoregressive/train/train_t2i.py --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt --image-size 512 \
  --data-path /path/to/high_aesthetic_10M --t5-feat-path /path/to/high_aesthetic_10M_flan_t5_xl \
  --short-t5-feat-path /path/to/high_aesthetic_10M_trunc_flan_t5_xl "$@"
