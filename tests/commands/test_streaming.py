"""Training straight from tar shards."""

import pytest

from dataset.tars import FolderSamples, write_shards
from tests.commands.shell import VQ_FLAGS, VQ_TRAIN, make_images, refused
from tests.processes import command_in_processes
from tokenizer.tokenizer_image import vq_train
from utils.logger import read_metrics

pytestmark = pytest.mark.slow


def flags_for(tmp_path, per_class, samples_per_shard):
    samples = FolderSamples(make_images(tmp_path / "images", per_class))
    write_shards(tmp_path / "shards", samples, samples_per_shard, samples.classes)
    return [*VQ_FLAGS, "--dataset", "tars", "--data-path", str(tmp_path / "shards")]


@pytest.mark.parametrize("world", [1, 2])
def test_the_tokenizer_trains_from_shards_and_continues(world, tmp_path):
    flags = [*flags_for(tmp_path, 8, 6), "--codebook-init", "kmeans", "--run-dir", str(tmp_path / "run")]
    for steps in ("8", "10"):
        command_in_processes(world, vq_train, vq_train.train, *flags, "--max-steps", steps)
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("6 steps an epoch") == 2 and "steps=8" in log
    assert [e["step"] for e in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 11))


def test_too_few_samples_are_an_error(tmp_path):
    flags = flags_for(tmp_path, 1, 1000)
    assert "3 samples, fewer than --global-batch-size 4" in refused(VQ_TRAIN, *flags, "--run-dir", tmp_path / "run")
