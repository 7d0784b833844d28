"""The tests of tests/vllm, run where vLLM is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.shell import ROOT

VENV = ROOT / Path(os.environ.get("VENV_VLLM", ".venv-vllm"))
SERVING = ["export", "exported", "llm", "vllm_engine", "vllm_plugin", "sample_c2i"]


@pytest.mark.slow
@pytest.mark.skipif(not any(VENV.glob(".llamagen-*")), reason=f"no vLLM in {VENV}: bash scripts/setup_vllm.sh")
def test_everything_in_vllms_own_environment():
    hidden = ("PYTEST_", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    line = [str(VENV / "bin/python"), "-m", "pytest", "-p", "no:cacheprovider", "--timeout", "120", "tests/vllm"]
    done = subprocess.run(
        line, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=840
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]


def test_serving_needs_no_torchvision_and_imports_vllm_late():
    imports = "; ".join(f"import autoregressive.serve.{name}" for name in SERVING)
    check = "import sys; loaded = {name.split('.')[0] for name in sys.modules}; print(loaded & {'torchvision', 'vllm'})"
    done = subprocess.run([sys.executable, "-c", f"{imports}; {check}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr
