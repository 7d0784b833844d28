#!/usr/bin/env bash
# Features of the BLIP captions that stage 1 trains on. Repeat a flag to override it.
#   bash scripts/language/extract_flan_t5_feat_laion_coco_stage1.sh --data-path LISTS --t5-path FEATURES
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12337
launch language/extract_t5_feature.py --data-path /path/to/laion_coco --t5-path /path/to/laion_coco_flan_t5_xl --caption-key blip "$@"
