#!/usr/bin/env bash
# Lint and all tests, on a fresh machine with nothing but Python 3.10+:   bash scripts/test.sh
# Flags go to pytest, for example:   bash scripts/test.sh -m "not slow"   or   bash scripts/test.sh tests/utils
# vLLM gets an environment of its own (scripts/setup_vllm.sh; 1.8 GB); TEST_VLLM=0 leaves it and its tests out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh requirements-dev.txt

# The demo's page is tested in Chromium; without it those tests are skipped.
if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing Chromium for the tests of the demo (once)"
  chromium="apt-get install -y -q --no-install-recommends chromium chromium-driver"
  $chromium >/dev/null 2>&1 || { apt-get update -q && $chromium; } >/dev/null 2>&1 \
    || echo "Chromium could not be installed: those tests are skipped" >&2
fi

ruff check .
if [ "${TEST_VLLM:-1}" != 0 ]; then
  bash scripts/setup_vllm.sh || echo "notice: the tests of serving with vLLM are skipped, see the line above"
fi
# Each test process computes on one thread; the processes fill the cores.
OMP_NUM_THREADS=1 exec python -m pytest --numprocesses "${TEST_PROCESSES:-auto}" --dist worksteal "$@"
