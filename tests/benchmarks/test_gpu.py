"""The program of GPU checks at its smallest sizes on a CPU: its frame, the sections of correctness, the kernels."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu import engines, evaluator, goldens, kernel_times, kernels, optimization, sharded
from benchmarks.gpu.context import Context
from benchmarks.gpu.report import markdown
from benchmarks.gpu.sections import SECTIONS
from tests.commands.shell import ROOT, environment

WRONG_ROTATION = """
import sys, torch
from pathlib import Path
from autoregressive.models import rope
from benchmarks.gpu import goldens
from benchmarks.gpu.context import Context
right = rope.apply_rotary_emb
rope.apply_rotary_emb = lambda x, table: right(x, table) * 1.01
goldens.run_tests(Context("goldens", torch.device("cpu"), Path(sys.argv[1]), tiny=True))
"""

NO_TIME = """
import importlib, sys, torch
from pathlib import Path
from benchmarks.gpu.context import Context
for name in sys.argv[2:]:
    context = Context(name, torch.device("cpu"), Path(sys.argv[1]), tiny=True, seconds=0.0)
    importlib.import_module(f"benchmarks.gpu.{name}").run(context)
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in the repository."""
    line = [sys.executable, *map(str, command)]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What the program wrote down, by name."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def context(folder: Path) -> Context:
    """A section's surroundings in this process."""
    return Context("test", torch.device("cpu"), folder, tiny=True)


EXPECTED = {
    "goldens": [
        "golden tests were collected", "gpt.rope_table", "gpt.rope_apply", "vq.quantizer", "vq.entropy",
        "inception odd pool", "inception odd spatial",
    ],
    "engines": [
        "noise words equal", "noise within 2 ulps",
        *(f"{engine}: {task}: {what}" for engine in ("eager", "compiled")
          for task in ("classes", "captions", "filtered") for what in ("tokens of the CPU", "any batch", "graphs")),
        "eager: bfloat16", "compiled: bfloat16", "compiled: int8", "compiled: bfloat16 in any batch", "triton",
    ],
    "optimization": [
        "losses of the CPU", "losses of the CPU, captions", "two micro-batches", "muon learns", "guard stops",
        "guard keeps the weights", "guard keeps the batch", "resume fp32", "resume bf16", "bf16 against fp32",
        "compiled bf16, activation checkpointing none", "compiled fp32, activation checkpointing selective",
        "compiled fp32, activation checkpointing full", "compiled bf16, activation checkpointing selective",
    ],
    "sharded": [
        "tensors are exchanged on the device", "all_reduce", "fsdp: losses of ddp", "fsdp: model of ddp",
        "fsdp: ema of ddp", "asynchronous checkpoints are whole", "consolidated.pth", "ddp continues fsdp",
        "fsdp continues ddp", "fsdp: bf16 losses of ddp", "fp16",
    ],
    "kernels": [
        *(f"{module}: has checks" for module in kernels.TINY),
        "engine.kernels.test_sampler: check_step", "engine.kernels.test_attention: check_wide_rows",
    ],
    "kernel_times": [
        "copy", "first launches",
        *(f"tiny {name}{form}" for name in ("wqkv", "wo", "w2", "head", "swiglu") for form in ("", " int8")),
        "tiny attention at 9", "tiny sample_tokens top_k 32", "tiny sample_tokens top_k 32 top_p 0.95",
        "tiny swiglu sweep",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("section", EXPECTED)
def test_sections_find_nothing_wrong_on_a_cpu(section, tmp_path):
    done = run("-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--sections", section, "--out", tmp_path)
    found = records(tmp_path)
    failed = {name: record for name, record in found.items() if record.get("passed") is False}
    assert not failed, done.stdout + done.stderr
    assert done.returncode == 0
    missing = [name for name in [*EXPECTED[section], "ran"] if name not in found]
    assert not missing
    assert (tmp_path / "results.md").read_text().count("## ") == 1
    assert json.loads((tmp_path / "results.json").read_text())["environment"]["torch"] == torch.__version__
    if section == "kernel_times":
        for name in ("tiny wqkv", "tiny attention at 9"):
            assert found[name]["share_of_copy_bandwidth"] == pytest.approx(found[name]["floor_us"] / found[name]["us"])
        assert found["tiny swiglu sweep"]["best_us"] == found["tiny swiglu sweep"]["default_us"] > 0


@pytest.mark.slow
def test_a_wrong_number_fails_the_goldens_that_see_it_and_no_others(tmp_path):
    done = run("-c", WRONG_ROTATION, tmp_path)
    assert done.returncode == 0, done.stderr
    found = records(tmp_path)
    assert {name for name, record in found.items() if record.get("passed") is False} == {"gpt.rope_apply"}
    assert "values differ" in str(found["gpt.rope_apply"]["failed"])


@pytest.mark.slow
def test_a_section_that_gets_no_time_is_a_failed_check(tmp_path):
    flags = ["--device", "cpu", "--tiny", "--sections", "sharded", "--budget", 3, "--out", tmp_path]
    done = run("-m", "benchmarks.gpu", *flags)
    assert done.returncode == 1
    assert records(tmp_path)["ran"]["error"] == "no time was left"


@pytest.mark.slow
def test_what_there_is_no_time_for_is_left_out_and_not_failed(tmp_path):
    done = run("-c", NO_TIME, tmp_path, "evaluator", "engines", "goldens", "optimization", "sharded")
    assert done.returncode == 0, done.stderr
    found = records(tmp_path)
    assert [name for name, record in found.items() if record.get("passed") is False] == []
    left_out = {name for name, record in found.items() if "skipped" in record}
    assert left_out >= {
        "frechet distance", "frechet distance: equal on all devices", "inception, as the evaluator", "inception",
        "eager: classes", "eager: bfloat16", "compiled: int8", "gpt.rope_apply", "losses of the CPU",
        "guard", "resume fp32", "bf16 against fp32", "muon learns", "losses of ddp",
        "asynchronous checkpoints are whole", "fsdp: bf16 losses of ddp",
    }  # fmt: skip


def test_distances_are_compared_where_all_were_measured(tmp_path):
    here, devices = context(tmp_path), ["cuda", "cpu"]
    for name, found in {
        "none": {}, "one": {"cuda": 3.0}, "equal": {"cuda": 3.0, "cpu": 3.00001},
        "other": {"cuda": 3.0, "cpu": 3.0001}, "nan": {"cuda": 3.0, "cpu": math.nan},
    }.items():  # fmt: skip
        (tmp_path / "records.jsonl").write_text("")
        evaluator.compare_distances(here, found, devices)
        record = records(tmp_path)["frechet distance: equal on all devices"]
        outcome = record.get("passed", record.get("skipped"))
        missing = {"none": "not measured on cuda, cpu", "one": "not measured on cpu"}
        assert outcome == missing.get(name, name == "equal"), name


def test_a_command_that_is_ended_early_had_no_time_and_one_that_had_enough_hangs(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    here = Context("test", torch.device("cpu"), tmp_path, seconds=kernels.RESERVE_S + 0.5)
    kernels.run_command(here, "not begun", command)
    monkeypatch.setattr(kernels, "START_S", 0.0)
    kernels.run_command(replace(here, started=time.perf_counter()), "ended", command)
    monkeypatch.setattr(kernels, "LONGEST_S", 0.1)
    kernels.run_command(replace(here, started=time.perf_counter()), "hangs", command)
    kernels.run_command(replace(here, started=time.perf_counter()), "wrong", [sys.executable, "-c", "1 / 0"])
    found = records(tmp_path)
    assert "skipped" in found["not begun"] and "skipped" in found["ended"]
    assert "passed" not in found["not begun"] and "passed" not in found["ended"]
    assert found["hangs"]["passed"] is found["wrong"]["passed"] is False and "ended after" in found["hangs"]["error"]


def test_time_that_is_not_there_is_written_down(tmp_path):
    here = Context("test", torch.device("cpu"), tmp_path, seconds=100.0)
    assert here.has_time("short", 50.0) and not (tmp_path / "records.jsonl").exists()
    assert not here.has_time("long", 200.0, batch=8)
    record = records(tmp_path)["long"]
    assert record["batch"] == 8 and record["skipped"].endswith("s left, needs 200") and "passed" not in record


def test_large_goldens_come_last(tmp_path):
    names = ["test_full_size[vq8_full]", "test_b[small]", "test_generation[gpt_b_c2i_generate]", "test_a[small]"]
    entry = {"kind": "some"}
    items = [SimpleNamespace(name=name, entry=entry) for name in names]
    with mock.patch.object(goldens, "_entry", lambda item: item.entry):
        goldens.OnDevice(context(tmp_path)).pytest_collection_modifyitems(items)
    assert [item.name for item in items] == [names[1], names[3], names[0], names[2]]


def test_sections_are_timed_alone_and_named_once():
    names = [section.name for section in SECTIONS]
    assert len(names) == len(set(names)) and set(EXPECTED) <= set(names)
    timed = {section.name: section.timed for section in SECTIONS}
    assert timed["kernel_times"] and not any(timed[name] for name in EXPECTED if name != "kernel_times")
    assert names.index("kernel_times") > max(names.index(name) for name in EXPECTED if not timed[name])


def test_a_failing_part_is_a_failed_check_and_ends_nothing(tmp_path):
    here = context(tmp_path)
    with here.attempt("division"):
        here.record("rate", images_per_s=1 / 0)
    here.check("after it", True)
    found = records(tmp_path)
    assert found["division"]["passed"] is False and "ZeroDivisionError" in found["division"]["error"]
    assert found["after it"] == {"section": "test", "name": "after it", "passed": True}
    text = markdown({"environment": {"device": "cpu"}, "command": "", "records": list(found.values())})
    assert "1 of 2 checks passed" in text and "test: division: ZeroDivisionError: division by zero" in text


def test_times_are_medians_in_milliseconds(tmp_path, monkeypatch):
    here = Context("test", torch.device("cpu"), tmp_path)
    clock = iter([0.0, 0.0, 1.0, 1.0, 3.0, 3.0, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls = []
    assert here.median_ms(lambda: calls.append(1), repeats=3, warm_up=0) == 2000.0
    assert len(calls) == 3


def test_tolerances_of_a_golden_are_widened_wherever_they_stand():
    entry = {"outputs": {"logits": {"atol": 1e-5, "rtol": 0.0}}, "expect_tolerance": {"atol": 2.0, "rtol": 1.0}, "n": 3}
    wide = goldens.wider(entry)
    assert wide["outputs"]["logits"] == {"atol": pytest.approx(1e-4), "rtol": 0.0}
    assert wide["expect_tolerance"] == {"atol": 20.0, "rtol": 10.0} and wide["n"] == 3


def test_changed_tokens_are_counted_by_image_and_by_code():
    expected = torch.zeros(4, 10, dtype=torch.int32)
    tokens = expected.clone()
    tokens[1, 4:6], tokens[3, 8] = 7, 7
    found = engines.changes(tokens, expected)
    assert found == {
        "share_of_images_changed": 0.5,
        "share_of_codes_changed": pytest.approx(3 / 40),
        "first_changed_code": 6.0,
    }
    assert engines.changes(expected, expected)["first_changed_code"] == 10.0


def test_captions_are_padded_on_the_left():
    features, masks = engines.random_captions(18, 16, 8)
    assert masks.sum(1).tolist() == [*range(1, 17), 1, 2]
    assert (masks[:, 1:] >= masks[:, :-1]).all()
    torch.testing.assert_close(features.norm(dim=-1), masks.float())


def test_losses_are_compared_relatively_and_nan_is_a_failure(tmp_path):
    assert optimization.difference([1.0, 4.4], [1.0, 4.0]) == pytest.approx(0.1)
    assert math.isnan(optimization.difference([1.0, math.nan], [1.0, 4.0]))
    here = context(tmp_path)
    optimization.compare(here, "nan", [math.nan], [1.0], 1.0)
    optimization.compare(here, "close", [1.0], [1.00005], 1e-4)
    sharded.compare_losses(here, "missing", [1.0], [1.0, 2.0], 1.0)
    assert math.isnan(sharded.largest_difference({"a": torch.tensor([1.0, math.nan])}, {"a": torch.ones(2)}))
    sharded.compare_losses(here, "nan of fsdp", [1.0, math.nan], [1.0, 2.0], 1.0)
    passed = {name: record["passed"] for name, record in records(tmp_path).items()}
    assert passed == {"nan": False, "close": True, "missing": False, "nan of fsdp": False}


def test_differences_of_weights():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    assert sharded.largest_difference(one, {"a": torch.tensor([1.0, 1.5]), "b": torch.tensor(1)}) == 2.0
    assert sharded.largest_difference(one, {**one, "b": torch.zeros(2)}) == math.inf
    with pytest.raises(KeyError, match="other keys"):
        sharded.largest_difference(one, {"a": one["a"]})


def test_kernels_that_are_not_there_are_a_failed_check(tmp_path):
    kernels.run_check(context(tmp_path), "engine.test_nothing", "check_it")
    record = records(tmp_path)["engine.test_nothing: check_it"]
    assert record["passed"] is False and "No module named" in record["error"]


def test_every_launch_has_operands_of_its_own_that_no_cache_holds(tmp_path):
    clock = kernel_times.Clock(context(tmp_path))
    assert clock.bytes_per_s > 0
    object.__setattr__(clock.context, "tiny", False)
    made: list[int] = []
    calls: list[int] = []

    def make():
        made.append(len(made))
        return lambda number=made[-1]: calls.append(number)

    clock.microseconds(make, kernel_times.UNCACHED_BYTES / 2.5)
    assert made == [0, 1, 2]
    assert calls[:4] == [0, 1, 2, 0] and len(calls) % kernel_times.LAUNCHES == 0
