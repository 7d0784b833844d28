#!/usr/bin/env bash
# Continues train_vq_finetune.sh from --vq-ckpt; repeat a flag to override it.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_vq.sh" \
  --disc-start 0 --dataset t2i_image \
  --data-path /path/to/high_aesthetic_10M --data-face-path /path/to/face_2M --cloud-save-path /path/to/cloud_disk "$@"
