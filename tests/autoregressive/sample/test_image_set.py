"""Sets of pictures for evaluation: which pictures they hold, and what they are called."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.build import checkpoint_tag
from autoregressive.models.gpt import GPT_models
from autoregressive.sample import image_set
from autoregressive.sample.image_set import SetPainter, folder_name, label_of, sample_image_set
from autoregressive.sample.sample_c2i_ddp import parser
from evaluations.render import beside, picture_path, read_notes
from tests.autoregressive.sample.tiny import tiny_models
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint

DEFAULTS = vars(parser().parse_args([]))


def arguments(*flags):
    return parser().parse_args([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[object]:
    return tiny_models(tmp_path_factory.mktemp("tiny"))


def sample(tiny, folder, *flags):
    return sample_image_set(arguments(*tiny, "--sample-dir", folder, *flags), DEFAULTS)


def test_the_established_names():
    flags = ["--gpt-ckpt", "pretrained_models/c2i_B.pt", "--cfg-scale", "2.0"]
    expected = "GPT-B-c2i_B-size-384-size-256-VQ-16-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0"
    assert folder_name(arguments(*flags), DEFAULTS) == expected
    assert folder_name(arguments(*flags, "--from-fsdp"), DEFAULTS) == expected.replace("c2i_B", "pretrained_models")
    assert "-size-32-size-32-" in folder_name(arguments(*flags, "--image-size", 32), DEFAULTS)
    assert checkpoint_tag("consolidated.pth", from_fsdp=True)  # a path without a folder
    other = ["--precision", "none", "--cfg-interval", "40", "--cfg-schedule", "linear", "--balanced-labels"]
    suffix = "-interval-40.0-schedule-linear-precision-none-balanced"
    assert folder_name(arguments(*flags, *other), DEFAULTS) == expected + suffix


def test_random_labels_are_those_of_the_seed_and_the_number():
    args = arguments("--num-classes", 7)
    labels = [label_of(i, args) for i in range(2000)]
    assert labels == [label_of(i, args) for i in range(2000)]
    counts = Counter(labels)
    assert len(counts) == 7 and all(220 < count < 350 for count in counts.values())
    other = [label_of(i, arguments("--num-classes", 7, "--global-seed", 1)) for i in range(2000)]
    assert 0.1 < np.mean(np.array(labels) == other) < 0.2  # one in seven by chance
    assert 0.1 < np.mean(np.array(labels[1:]) == other[:-1]) < 0.2


def test_balanced_labels_are_all_classes_in_turn():
    args = arguments("--balanced-labels")
    assert set(Counter(label_of(i, args) for i in range(50_000)).values()) == {50}
    assert len({label_of(i, args) for i in range(1000, 2000)}) == 1000


def test_the_npz_holds_exactly_the_pictures_and_a_restart_gives_the_same_bytes(tiny, tmp_path):
    whole = sample(tiny, tmp_path / "whole", "--num-fid-samples", 7, "--per-proc-batch-size", 3)
    assert whole.name == (
        "GPT-XS-gpt-size-16-size-16-VQ-4-S-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0-precision-none"
    )
    with np.load(beside(whole, ".npz")) as file:
        pictures = file["arr_0"]
    assert pictures.shape == (7, 16, 16, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures[5], np.asarray(Image.open(picture_path(whole, 5))))
    args = arguments(*tiny)
    notes = list(read_notes(whole, 7))
    assert [int(note["class_id"]) for note in notes] == [label_of(i, args) for i in range(7)]
    assert [int(note["seed"]) for note in notes] == list(range(7))

    parts = sample(tiny, tmp_path / "parts", "--num-fid-samples", 4, "--per-proc-batch-size", 4)
    picture_path(parts, 2).unlink()
    sample(tiny, tmp_path / "parts", "--num-fid-samples", 7, "--per-proc-batch-size", 1)
    assert beside(parts, ".npz").read_bytes() == beside(whole, ".npz").read_bytes()


def test_a_picture_can_be_drawn_again_alone_by_its_seed(tiny, tmp_path):
    whole = sample(tiny, tmp_path, "--num-fid-samples", 4, "--balanced-labels")
    again = sample(
        tiny, tmp_path, "--num-fid-samples", 1, "--balanced-labels", "--global-seed", 3
    )  # class 0, as number 3
    np.testing.assert_array_equal(Image.open(picture_path(again, 0)), Image.open(picture_path(whole, 3)))


def test_another_checkpoint_of_the_same_name_is_refused(tiny, tmp_path):
    sample(tiny, tmp_path, "--num-fid-samples", 1)
    other = checkpoint.read(arguments(*tiny).gpt_ckpt)
    other["model"]["output.weight"] *= 2
    checkpoint.save(other, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match="gpt_sha256"):
        sample(tiny, tmp_path, "--num-fid-samples", 1, "--gpt-ckpt", tmp_path / "gpt.pt")


def test_other_sizes_are_resized(tiny, tmp_path):
    folder = sample(tiny, tmp_path, "--num-fid-samples", 2, "--image-size-eval", 8, "--no-npz")
    assert Image.open(picture_path(folder, 1)).size == (8, 8)
    assert not beside(folder, ".npz").exists()


def test_out_of_memory_halves_the_batch_and_the_pictures_stay_the_same(tiny, tmp_path, monkeypatch, capsys):
    whole = sample(tiny, tmp_path / "a", "--num-fid-samples", 5)
    real = image_set.sample_codes

    def scarce(gpt, seeds, **conditions):
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(gpt, seeds=seeds, **conditions)

    monkeypatch.setattr(image_set, "sample_codes", scarce)
    halved = sample(tiny, tmp_path / "b", "--num-fid-samples", 5, "--per-proc-batch-size", 5)
    assert "out of memory at a batch of 5, goes on with 2" in capsys.readouterr().out
    assert beside(halved, ".npz").read_bytes() == beside(whole, ".npz").read_bytes()


def test_a_batch_is_filled_up_where_kernels_depend_on_it_until_the_memory_is_short(tiny, monkeypatch):
    asked = []

    def codes(gpt, cond, args, seeds):
        asked.append((len(cond), len(seeds)))
        if len(cond) > 4:
            raise torch.OutOfMemoryError
        return torch.zeros(len(cond), 16, dtype=torch.int32)

    monkeypatch.setattr(image_set, "sample_codes", codes)
    painter = SetPainter(
        GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3),
        VQ_models["VQ-4-S"](codebook_size=64).eval(),
        arguments(*tiny),
    )
    painter.rows = 8  # as on a GPU
    with pytest.raises(torch.OutOfMemoryError):
        painter([0, 1, 2])
    drawn = painter([0, 1, 2])
    assert asked == [(8, 8), (4, 4)] and drawn.pictures.shape == (3, 16, 16, 3)


def test_mistakes_are_named(tiny, tmp_path):
    for flags, message in [
        (["--num-fid-samples", 0], "--num-fid-samples must be at least 1"),
        (["--gpt-type", "t2i"], "t2i is not for it"),
        (["--top-p", 2], "top_p is 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(tiny, tmp_path, *flags)


def test_guidance_without_a_null_class_is_a_clear_error(tiny, tmp_path):
    gpt = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3, class_dropout_prob=0.0)
    checkpoint.save({"model": gpt.state_dict()}, tmp_path / "gpt.pt")
    flags = ["--gpt-ckpt", tmp_path / "gpt.pt", "--num-fid-samples", 2]
    with pytest.raises(ValueError, match=r"needs a null class, but .*gpt.pt has 3 class embeddings"):
        sample(tiny, tmp_path, *flags)
    sample(tiny, tmp_path, *flags, "--cfg-scale", 1.0)
    with pytest.raises(ValueError, match=r"it has 3 classes and a null class \(then give --num-classes 3\)"):
        sample(tiny, tmp_path, "--num-classes", 4, "--num-fid-samples", 2)
