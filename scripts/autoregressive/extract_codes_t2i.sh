#!/usr/bin/env bash
# Extracts codes of caption lists; all flags are passed on.
#   nproc_per_node=8 bash scripts/autoregressive/extract_codes_t2i.sh --vq-ckpt VQ.pt --data-path LISTS --code-path CODES
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12336
launch autoregressive/train/extract_codes_t2i.py "$@"
