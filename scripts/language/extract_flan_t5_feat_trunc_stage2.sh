#!/usr/bin/env bash
# Features of the first sentences of the captions of stage 2. Repeat a flag to override it.
#   bash scripts/language/extract_flan_t5_feat_trunc_stage2.sh --data-path LISTS --t5-path FEATURES
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
nproc_default="$(gpus)" port_default=12337
launch language/extract_t5_feature.py --data-path /path/to/high_aesthetic_10M --t5-path /path/to/high_aesthetic_10M_trunc_flan_t5_xl --trunc-caption "$@"
