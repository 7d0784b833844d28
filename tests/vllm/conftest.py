"""vLLM's tests are collected only where vLLM is; then its engines work in the test's own process, quietly."""

import os
from importlib.util import find_spec

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest


@pytest.fixture
def preemptions(monkeypatch):
    """Counts how often vLLM takes an image's memory away."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen = []
    real = Scheduler._preempt_request

    def counted(self, request, *args, **kwargs):
        seen.append(request.request_id)
        return real(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    return lambda: len(seen)
