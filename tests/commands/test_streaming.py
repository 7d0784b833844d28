"""Training straight from tar shards."""

import pytest

from tests.commands.shell import VQ_FLAGS, VQ_TRAIN, make_images, run
from utils.logger import read_metrics

pytestmark = pytest.mark.slow


def test_the_tokenizer_trains_from_shards_on_one_and_two_processes_and_continues(tmp_path):
    images = make_images(tmp_path / "images", per_class=8)
    run("dataset/tars.py", "--data-path", images, "--output", tmp_path / "shards", "--samples-per-shard", 6)
    flags = [*VQ_FLAGS, "--dataset", "tars", "--data-path", tmp_path / "shards", "--codebook-init", "kmeans"]
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        assert "6 steps an epoch" in run(VQ_TRAIN, *flags, "--max-steps", 8, "--run-dir", run_dir, processes=processes)
        printed = run(VQ_TRAIN, *flags, "--max-steps", 10, "--run-dir", run_dir, processes=processes)
        assert "steps=8" in printed
        assert [e["step"] for e in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 11))


def test_too_few_samples_are_an_error(tmp_path):
    images = make_images(tmp_path / "images", per_class=1)
    run("dataset/tars.py", "--data-path", images, "--output", tmp_path / "shards")
    flags = [*VQ_FLAGS, "--dataset", "tars", "--data-path", tmp_path / "shards", "--run-dir", tmp_path / "run"]
    assert "3 samples, fewer than --global-batch-size 4" in run(VQ_TRAIN, *flags, code=2)
