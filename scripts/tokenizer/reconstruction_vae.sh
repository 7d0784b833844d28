#!/usr/bin/env bash
# Reconstructs and measures images on all GPUs of this machine (or nproc_per_node processes); all flags are passed on.
#   bash scripts/tokenizer/reconstruction_vae.sh --data-path IMAGES
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12344
launch tokenizer/vae/reconstruction_vae_ddp.py "$@"
