"""The serving benchmark on a small model, where vLLM is not; its numbers fit together."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import serving


def test_the_last_line_is_one_json_object(monkeypatch, capsys, tmp_path):
    flags = ["--gpt-model", "GPT-XS", "--image-size", "64", "--images", "3", "--single-images", "2", "--engine",
             "eager", "--device", "cpu", "--venv", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["serving.py", *flags])
    serving.main()
    printed = capsys.readouterr().out.splitlines()
    assert any("vLLM is not in" in line and "bash scripts/setup_vllm.sh" in line for line in printed)
    rows = json.loads(printed[-1])["rows"]
    one, batch = rows["generate, one at a time"], rows["eager, one batch"]
    assert (one["images"], batch["images"], one["ratio"]) == (2, 3, 1.0)
    assert batch["tokens_per_s"] == pytest.approx(16 * batch["images_per_s"], rel=0.02)
    assert batch["ratio"] == pytest.approx(batch["images_per_s"] / one["images_per_s"], rel=0.1)


def test_sizes_that_mean_nothing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serving.py", "--images", "0"])
    with pytest.raises(ValueError, match="at least 1"):
        serving.main()
