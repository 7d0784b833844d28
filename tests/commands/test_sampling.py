"""The sampling commands as users start them: on one and two processes, killed and started again."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.autoregressive.sample.tiny import tiny_models
from tests.commands.shell import SAMPLE, run
from tests.commands.test_faults import interrupt, start

SAMPLE_SET = "autoregressive/sample/sample_c2i_ddp.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[object]:
    return tiny_models(tmp_path_factory.mktemp("tiny"))


def npz_of(folder: Path) -> Path:
    (path,) = folder.glob("*.npz")
    return path


def test_a_set_killed_on_two_processes_and_finished_on_one_is_the_same_to_the_byte(tiny, tmp_path):
    flags = [*tiny, "--num-fid-samples", 251, "--num-threads", 1, "--sample-dir"]
    printed = run(SAMPLE_SET, *flags, tmp_path / "whole", "--per-proc-batch-size", 32)
    assert "251 pictures are saved" in printed and "image/s" in printed
    process = start(SAMPLE_SET, *flags, tmp_path / "killed", "--per-proc-batch-size", 4, processes=2)
    done = lambda: len(list((tmp_path / "killed").rglob("*.png")))  # noqa: E731
    interrupt(process, lambda: done() > 40, signal.SIGKILL)
    assert 40 < done() < 251
    assert not list((tmp_path / "killed").glob("*.npz"))
    run(SAMPLE_SET, *flags, tmp_path / "killed", "--per-proc-batch-size", 7)
    assert npz_of(tmp_path / "killed").read_bytes() == npz_of(tmp_path / "whole").read_bytes()

    run(SAMPLE_SET, *flags, tmp_path / "two", "--per-proc-batch-size", 16, processes=2)
    assert npz_of(tmp_path / "two").read_bytes() == npz_of(tmp_path / "whole").read_bytes()


def test_single_files_carry_class_seed_and_settings(tiny, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(["red kite", "green", "blue"]))
    flags = [*tiny, "--class-names", tmp_path / "names.json", "--class-labels", "blue", "red kite", "--seed", 5,
             "--images-per-class", 2, "--batch-size", 3, "--output-dir", tmp_path / "single"]  # fmt: skip
    run(SAMPLE, *flags)
    names = sorted(path.name for path in (tmp_path / "single").iterdir())
    assert names == ["000000-blue.png", "000001-blue.png", "000002-red-kite.png", "000003-red-kite.png"]
    with Image.open(tmp_path / "single" / names[2]) as picture:
        facts = {name: json.loads(value) if name != "class_name" else value for name, value in picture.text.items()}
        third = np.asarray(picture)
    assert (facts["class_id"], facts["class_name"], facts["seed"], facts["number"]) == (0, "red kite", 7, 2)
    assert facts["settings"]["cfg_scale"] == 2.0
    again = [*tiny, "--class-labels", 0, "--seed", 7, "--output-dir", tmp_path / "again"]
    run(SAMPLE, *again)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again/000000-0.png")), third)
