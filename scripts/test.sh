#!/usr/bin/env bash
# Lint and all tests, on a fresh machine with nothing but Python 3.10+:   bash scripts/test.sh
# Flags go to pytest, for example:   bash scripts/test.sh -m "not slow"   or   bash scripts/test.sh tests/utils
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh requirements-dev.txt

ruff check .
# Each test process computes on one thread; the processes fill the cores.
OMP_NUM_THREADS=1 exec python -m pytest --numprocesses "${TEST_PROCESSES:-auto}" --dist worksteal "$@"
