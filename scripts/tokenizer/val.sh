#!/usr/bin/env bash
# Writes the centre-cropped originals on all GPUs of this machine (or nproc_per_node processes); all flags are passed on.
#   bash scripts/tokenizer/val.sh --data-path IMAGES
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12343
launch tokenizer/validation/val_ddp.py "$@"
