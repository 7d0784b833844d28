#!/usr/bin/env bash
# Draws the pictures for evaluation on all GPUs of this machine; all flags are passed on.
#   nproc_per_node=8 bash scripts/autoregressive/sample_c2i.sh --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --cfg-scale 2.0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12345
launch autoregressive/sample/sample_c2i_ddp.py --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "$@"
