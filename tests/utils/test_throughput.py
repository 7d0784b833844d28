"""The speed of a training, and its log line."""

import pytest
import torch

from utils import throughput
from utils.throughput import StepCost, log_line, peak_memory, speed_of

CPU = torch.device("cpu")


def test_speeds_by_hand():
    speed = speed_of(StepCost(tokens=512, flops=8e12), 2.0, CPU, devices=4)
    assert speed["tokens_per_second"] == 1024 and speed["teraflops_per_device"] == pytest.approx(4.0)
    assert "mfu" not in speed  # nobody knows this CPU's peak
    assert set(speed_of(None, 2.0, CPU, 1)) == {"steps_per_second", "memory_gb"}


def test_a_known_gpu_has_an_mfu(monkeypatch):
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(throughput.torch.cuda, "max_memory_allocated", lambda device: 5e9)
    speed = speed_of(StepCost(tokens=1, flops=156e12), 4.0, torch.device("cuda:0"), devices=2)
    assert speed["mfu"] == pytest.approx(1.0) and speed["memory_gb"] == 5.0


def test_memory_of_this_process_grows_with_its_tensors():
    before = peak_memory(CPU)
    held = torch.ones(before // 4 + 2**25)  # more than everything before
    assert peak_memory(CPU) >= held.numel() * 4


def test_the_line_begins_as_established_and_says_the_rest():
    means = {"loss": 8.12344, "grad_norm": 0.5, "lr": 1e-4, "other": 3.0}
    speed = {"steps_per_second": 2.344, "tokens_per_second": 153600.0, "mfu": 0.512, "memory_gb": 12.34,
             "teraflops_per_device": 506.0}  # fmt: skip
    assert log_line(100, means, speed, 3725) == (
        "(step=0000100) Train Loss: 8.1234, Train Steps/Sec: 2.34, Grad Norm: 0.500, LR: 1.00e-04, "
        "Tokens/Sec: 153,600, MFU: 51.2%, Memory: 12.3 GB, ETA: 1:02:05"
    )
    del speed["mfu"]
    assert "Memory: 12.3 GB, TFLOP/s per device: 506, ETA" in log_line(100, means, speed, 3725)
