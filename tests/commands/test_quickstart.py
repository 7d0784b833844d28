"""The whole quick start, with hardly any training: every stage, the report, and a second run that has nothing to do."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.commands.shell import ROOT, environment
from utils.files import read_json

pytestmark = pytest.mark.slow


def quickstart(*flags: object) -> subprocess.CompletedProcess:
    """Run it in the environment of this test."""
    env = {**environment(), "VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}
    line = ["bash", "scripts/quickstart.sh", *map(str, flags)]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800)


class Report(HTMLParser):
    """Collects a page's pictures and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.images, self.words = 0, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img" and dict(attrs)["src"].startswith("data:image/png;base64,")

    def handle_data(self, data):
        self.words += data


def test_quickstart_runs_through_and_a_second_run_trains_nothing(tmp_path):
    first = quickstart("--minutes", 0.1, "--out", tmp_path / "qs")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    check_report(tmp_path / "qs")
    checkpoints = {path: path.stat().st_mtime_ns for path in (tmp_path / "qs").rglob("*.pt")}
    again = quickstart("--minutes", 0.1, "--out", tmp_path / "qs")
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "qs").rglob("*.pt")} == checkpoints


def check_report(folder: Path) -> None:
    plan = read_json(folder / "plan.json")
    report = Report((folder / "report.html").read_text())
    assert report.images == 16 + 2  # one strip for each class, reconstructions, curves
    for expected in (f"{plan['vq_steps']:,} steps", "dB", "bits per token", "cat-face", "OpenMoji", "render the data"):
        assert expected in report.words, expected


def test_quickstart_with_texts_labels_them_and_compares_with_the_drawings(tmp_path):
    done = quickstart("--text", "--minutes", 0.1, "--out", tmp_path / "qs")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = Report((tmp_path / "qs/report.html").read_text())
    assert report.images == 16 + 2  # one strip for each text, reconstructions, curves
    for expected in ("red heart (seen)", "sun (held out)", "blue apple (new)", "among the 10 nearest of 1,803"):
        assert expected in report.words, expected
    found = read_json(tmp_path / "qs/retrieval.json")
    assert (found["pictures"], found["gallery"]) == (361, 1803)
    assert found["chance"]["10"] == pytest.approx(10 / 1803, rel=0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minuets", "3"], "--minuets"),
        (["--minutes", "0"], "above 0, found 0"),
        (["--minutes", "0.0"], "above 0, found 0.0"),
        (["--minutes", "ten"], "above 0, found ten"),
        (["--minutes", "-1"], "above 0, found -1"),
    ],
)
def test_wrong_flags_are_found_before_any_work(flags, message, tmp_path):
    done = quickstart(*flags, "--out", tmp_path / "qs")
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "qs").exists()
