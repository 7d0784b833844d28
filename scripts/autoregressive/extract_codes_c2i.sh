#!/usr/bin/env bash
# Extracts codes on all GPUs of this machine; all flags are passed on.
#   nproc_per_node=8 bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt VQ.pt --data-path IMAGES --code-path CODES
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12335
launch autoregressive/train/extract_codes_c2i.py "$@"
