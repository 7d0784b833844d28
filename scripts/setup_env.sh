#!/usr/bin/env bash
# Sourced by quickstart.sh and test.sh: activates a Python environment that has the given requirements file.
#   source scripts/setup_env.sh requirements.txt
# An environment that is already active (venv or conda) is used; else .venv is made in the repository.
# The packages are installed when the requirements changed since the last time.

setup_env() {
  local requirements="$1" python stamp
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
      python="$(command -v python3)" || { echo "error: python3 not found; install Python 3.10 or newer" >&2; return 1; }
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || { echo "error: $("$python" --version) is too old; install Python 3.10 or newer" >&2; return 1; }
      echo "Making a virtual environment in .venv"
      "$python" -m venv .venv \
        || { rm -rf .venv; echo "error: could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; return 1; }
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.llamagen-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$(basename "$requirements")"
  if [ ! -e "$stamp" ]; then
    echo "Installing $requirements (once, a few minutes)"
    python -m pip install --quiet --disable-pip-version-check -r "$requirements" \
      || { echo "error: pip could not install $requirements" >&2; return 1; }
    touch "$stamp"
  fi
}

setup_env "$1"
