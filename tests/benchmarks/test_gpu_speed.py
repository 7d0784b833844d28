"""The GPU program's timed sections run on a CPU, and its report says what the records say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import report, tokenizer, training
from benchmarks.gpu.context import Context
from benchmarks.gpu.probe import ceilings
from benchmarks.gpu.profiling import Profile, busy, profile, short
from utils.image import make_grid_image

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
EXPECTED = {  # names of records, each with values that it must have
    "probe": {"ceilings": "product_tflops", "attention": "kernels", "versions": "torch", "process group": "backend",
              "attention causal, head_dim 100: values": "error",
              "attention decode, mask, head_dim 100: values": "error"},
    "images": {"images": "vq_ms_per_image", "images, batch 3, decoder bf16, finite": "shape"},
    "training": {"training": "ms_per_step", "profile": "idle_share", "GPT-XS, eager: losses": "losses",
                 "GPT-XS, compiled, --residual-dtype compute: losses": "losses"},
    "tokenizer": {"decode": "psnr_db", "encode": "share_of_equal_codes", "training step": "images_per_s",
                  "codes of the emoji tokenizer": "share_of_equal_codes_tf32", "quantizer": "ms"},
    "evaluator": {"inception": "relative_difference", "frechet distance": "trace_seconds"},
    "extraction": {"ten-crop extraction": "crops_per_s", "image loader": "images_per_s", "code loader": "codes_per_s"},
    "serving": {"worker": "p95_seconds", "worker: all answered": "passed"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("section", EXPECTED)
def test_section(section, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--sections", section], cwd=ROOT, capture_output=True, text=True)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [r for r in records if r.get("passed") is False] == []
    assert done.returncode == 0, done.stderr[-2000:]
    found = {record["name"]: record for record in records}
    assert {name: value for name, value in EXPECTED[section].items() if value not in found.get(name, {})} == {}
    assert found["ran"]["passed"]


NOT_NEEDED = (
    "webdataset",
    "ftfy",
    "bs4",
    "uvicorn",
    "starlette",
    "httpx",
    "multipart",
    "lpips",
    "tensorflow",
    "gradio",
)
HIDDEN = f"""
import importlib, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in {NOT_NEEDED} else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in {list(EXPECTED)}:
    importlib.import_module(f"benchmarks.gpu.{{name}}")
"""


@pytest.mark.slow
def test_sections_need_few_packages():
    done = subprocess.run([sys.executable, "-c", HIDDEN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_kernels_and_gaps():
    seen = Profile((("a", 0.0, 4000.0), ("b", 3000.0, 5000.0), ("a", 8000.0, 10000.0)))
    assert seen.totals == {"a": (2, 6.0), "b": (1, 2.0)}
    assert seen.idle_share == pytest.approx(0.3)
    assert seen.top(1) == ["75.0% a"]
    assert seen.table().splitlines()[-1] == "idle 30.0%" and len(seen.table(1).splitlines()) == 2
    assert busy([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert Profile(()).idle_share == 0
    assert short("void at::native::(anonymous namespace)::sum<float>") == "sum<float>"


def test_a_profile_knows_what_ran(tmp_path):
    context = Context("some", CPU, tmp_path)
    found = profile(context, lambda: torch.ones(8, 8) @ torch.ones(8, 8))
    assert found.totals["aten::mm"][0] == 1 and 0 <= found.idle_share < 1


def test_a_case_of_training_is_flags_of_the_command():
    case = training.Case("GPT-XS", 4, accumulation=2, checkpointing="full", flags=("--residual-dtype", "compute"))
    args = training.training_args(case, 4, "codes", "runs", 64)
    assert (args.global_batch_size, args.gradient_accumulation_steps, args.compile) == (8, 2, True)
    assert (args.activation_checkpointing, args.residual_dtype) == ("full", "compute")
    assert case.name == "GPT-XS, compiled, --residual-dtype compute"
    assert training.Case("GPT-L", 32, compiled=False).name == "GPT-L, eager"


def test_cases_of_training_are_named_once():
    for cases in (training.CASES, training.TINY):
        assert len({case.name for case in cases}) == len(cases)


def test_ceilings_are_measured_once(tmp_path):
    context = Context("probe", CPU, tmp_path, tiny=True)
    first = ceilings(context)
    assert min(first) > 0 and ceilings(Context("training", CPU, tmp_path, tiny=True)) == first
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1


def test_images_of_a_sheet(tmp_path):
    images = torch.rand(6, 3, 8, 8)
    make_grid_image(images, 3).save(tmp_path / "sheet.png")
    cut = tokenizer._sheet_images(tmp_path / "sheet.png", edge=8)
    single = np.stack([np.asarray(make_grid_image(images[i : i + 1], 1)) for i in range(6)])
    assert (cut.numpy() == single).all() and Image.open(tmp_path / "sheet.png").size == (32, 22)


def test_psnr_of_a_known_error():
    exact = torch.tensor([0.0, 2.0])
    assert tokenizer._psnr(exact + 0.02, exact) == pytest.approx(40.0, abs=1e-3)
    assert tokenizer._psnr(exact, exact) == 200.0


def run_of(*records, device="H100", command="benchmarks.gpu --out one"):
    return {"environment": {"device": device, "torch": "2.11", "cudnn": None}, "command": command, "records": records}


DECODE = [
    {
        "section": "decode",
        "name": f"GPT-{size}, batch 8",
        "ms_per_step": ms,
        "share_of_floor": share,
        "peak_gb": 3.14159,
    }
    for size, ms, share in (("L", 0.55234, 0.6), ("XL", 1.0, 0.7012))
]


def test_records_of_one_kind_are_a_table():
    lines = report.markdown(run_of(*DECODE)).splitlines()
    at = lines.index("## decode")
    assert lines[at + 2 :] == [
        "| what | ms per step | share of floor | peak GB |",
        "| --- | --- | --- | --- |",
        "| GPT-L, batch 8 | 0.552 | 60.0 % | 3.14 |",
        "| GPT-XL, batch 8 | 1.00 | 70.1 % | 3.14 |",
    ]


def test_records_of_equal_names_need_no_name_and_others_are_lists():
    rows = [{"section": "s", "name": "training", "gpt_model": m, "compiled": m == "L", "mfu": 0.4567} for m in "LX"]
    rows[1]["reason"] = "slow | old"
    alone = {"section": "s", "name": "ceilings", "copy_gb_per_s": 3012.4, "product_tflops": 798.0}
    text = report.markdown(run_of(*rows, alone))
    assert "training:\n\n| GPT model | compiled | MFU | reason |\n| --- | --- | --- | --- |\n" in text
    assert "| L | yes | 45.7 % |  |\n| X | no | 45.7 % | slow \\| old |\n" in text
    assert "- ceilings: copy GB/s 3,010, product TFLOP/s 798\n" in text


def test_what_failed_stands_first_and_what_was_left_out_last():
    records = (
        {"section": "a", "name": "codes", "passed": True, "share_of_equal_codes": 0.99987},
        {"section": "a", "name": "b", "passed": False, "error": "ValueError: no", "where": "a long story"},
        {"section": "a", "name": "c", "batch": 256, "skipped": "needs 91 GB"},
    )
    text = report.markdown(run_of(*records))
    assert text.index("1 of 2 checks passed.") < text.index("- **failed**: a: b: ValueError: no") < text.index("## a")
    assert "| codes | passed | share of equal codes 99.99 % |" in text and "| b | **failed** |  |" in text
    assert text.endswith("- c (batch 256): left out: needs 91 GB\n") and "a long story" not in text


def test_a_later_run_takes_the_place_of_an_earlier_ones_sections(tmp_path, monkeypatch, capsys):
    other = {"section": "probe", "name": "ran", "passed": False, "seconds": 1.0}
    again = [{**record, "ms_per_step": 0.4} for record in DECODE]
    for name, results in (("1", run_of(*DECODE, other)), ("2", run_of(*again, device="H200", command="two"))):
        (tmp_path / name).write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "1"), str(tmp_path / "2")])
    report.main()
    text = capsys.readouterr().out
    assert text.startswith("# GPU results: H100, H200\n\nRun 1: device H100, torch 2.11. Sections: probe.\n")
    assert "Run 2: device H200, torch 2.11. Sections: decode.\n\n`two`\n" in text
    assert "## decode (run 2)" in text and "0.400" in text and "0.552" not in text
    assert "## probe (run 1)" in text and "0 of 1 checks passed." in text
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--write", str(tmp_path / "out.md")])
    report.main()
    assert (tmp_path / "out.md").read_text() == text and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.8749, "1.87"), (0.033149, "0.0331"), (12345.6, "12,300"), (798.0, "798"), (99.96, "100"), (0.0, "0"),
     (1.234e-7, "1.23e-07"), (-5.5555, "-5.56"), (float("nan"), "nan")],
)  # fmt: skip
def test_rounding(value, text):
    assert report.rounded(value) == text


def test_a_summary_holds_what_it_was_measured_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/__main__.py", "--out", "x"])
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in DECODE))
    results = report.summary(tmp_path, CPU)
    assert results["records"] == DECODE and results["command"] == "python3 -m benchmarks.gpu --out x"
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["driver"] is None
    assert "## decode" in report.markdown(json.loads(json.dumps(results)))
