#!/usr/bin/env bash
# Sourced by the launchers: `launch script.py FLAGS` runs a script under torchrun from the repository's folder.
# What runs where is read from the environment; everything has a default:
#   nproc_per_node=8                                        processes on this machine (usually one per GPU)
#   nnodes=2 node_rank=0 master_addr=HOST master_port=29500 several machines: the same on each, but for node_rank
# A launcher may set nproc_default and port_default before it calls launch.

# The number of GPUs of this machine, 1 without any: what nproc_default may be set to.
gpus() {
  local found
  found="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" || true
  echo "$((found > 0 ? found : 1))"
}

launch() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
  set -x
  exec torchrun \
    --nnodes="${nnodes:-1}" --nproc_per_node="${nproc_per_node:-${nproc_default:-1}}" --node_rank="${node_rank:-0}" \
    --master_addr="${master_addr:-127.0.0.1}" --master_port="${master_port:-${port_default:-29500}}" "$@"
}
