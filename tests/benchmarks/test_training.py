"""The training benchmark on the smallest model."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import training
from utils.guard import LossGuard

FLAGS = ["--gpt-model", "GPT-XS", "--image-size", "64", "--batch-size", "2", "--device", "cpu"]


def test_variants_do_the_same_training():
    args = training.parser().parse_args([*FLAGS, "--quick", "--steps", "1"])
    plain, trainer = (training.measure(args, name) for name in ("plain fp32", "trainer none"))
    assert plain["first_loss"] == pytest.approx(9.704, abs=1e-3) == trainer["first_loss"]
    assert plain["tokens_per_second"] == pytest.approx(2 * 16 / plain["seconds_per_step"], rel=1e-2)
    assert trainer["mfu"] > 0 and trainer["peak_memory_gb"] > 0.1
    assert training.variants(torch.device("cuda"), True) == ["plain bf16", "trainer bf16", "trainer bf16 compiled"]


def test_the_trainer_is_guarded_and_gets_micro_batches(monkeypatch):
    judged, admits = [], LossGuard.admits

    def spy(guard, loss, norm, number, batches):
        judged.append((number, [batch[0].shape for batch in batches]))
        return admits(guard, loss, norm, number, batches)

    monkeypatch.setattr(LossGuard, "admits", spy)
    args = training.parser().parse_args([*FLAGS, "--steps", "2", "--gradient-accumulation-steps", "2"])
    plain, trainer = (training.measure(args, name) for name in ("plain fp32", "trainer none"))
    assert judged == [(number, [(1, 1, 16)] * 2) for number in (1, 2, 3)]
    assert plain["first_loss"] == pytest.approx(9.704, abs=1e-3) == trainer["first_loss"]  # means over micro-batches


def test_batches_that_cannot_be_cut(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training.py", *FLAGS, "--gradient-accumulation-steps", "3"])
    with pytest.raises(ValueError, match="2 is not a multiple"):
        training.main()


def test_the_last_line_is_one_json_object(monkeypatch, capsys):
    seconds = {"plain fp32": 4.0, "plain bf16": 3.0, "trainer bf16": 2.0}
    monkeypatch.setattr(training, "measure_apart", lambda variant: {
        "variant": variant, "seconds_per_step": seconds[variant], "tokens_per_second": 1.0, "mfu": 0.5,
        "peak_memory_gb": 2 * seconds[variant], "first_loss": 9.704,
    })  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["training.py", *FLAGS, "--quick"])
    training.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["speedup"] == 2.0 and result["memory_ratio"] == 0.5 and len(result["variants"]) == 3
