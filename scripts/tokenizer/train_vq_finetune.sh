#!/usr/bin/env bash
# Fine-tunes the released class-conditional tokenizer on lists of images; repeat a flag to override it.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_vq.sh" \
  --finetune --disc-start 0 --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt --dataset t2i_image \
  --data-path /path/to/high_aesthetic_10M --data-face-path /path/to/face_2M --cloud-save-path /path/to/cloud_disk "$@"
