"""Images -> tokenizer -> codes -> GPT -> pictures, by the commands, alone and with two processes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import train_c2i
from tests.commands.shell import (
    EXTRACT,
    GPT_FLAGS,
    GPT_SIZE,
    ROOT,
    SAMPLE,
    TRAIN,
    VQ_FLAGS,
    VQ_SIZE,
    VQ_TRAIN,
    make_images,
    refused,
    run,
)
from tests.processes import command_in_processes
from tokenizer.tokenizer_image import vq_train
from utils import checkpoint
from utils.logger import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """The folder of a chain that ran through: images, vq, codes, gpt, samples.png."""
    work = tmp_path_factory.mktemp("chain")
    images = make_images(work / "images")
    run(
        VQ_TRAIN,
        *VQ_FLAGS,
        "--data-path",
        images,
        "--val-data-path",
        images,
        "--max-steps",
        6,
        "--run-dir",
        work / "vq",
        "--codebook-init",
        "kmeans",
        "--revive-every",
        2,
        "--optimizer",
        "muon",
        "--ema",
    )
    run(
        EXTRACT,
        *VQ_SIZE,
        "--vq-ckpt",
        work / "vq/checkpoints/0000006.pt",
        "--data-path",
        images,
        "--code-path",
        work / "codes",
        "--num-workers",
        0,
        "--layout",
        "files",
    )
    run(
        TRAIN,
        *GPT_FLAGS,
        "--code-path",
        work / "codes",
        "--val-code-path",
        work / "codes",
        "--max-steps",
        6,
        "--run-dir",
        work / "gpt",
        "--val-every",
        3,
        "--ema",
    )
    run(SAMPLE, *sample_flags(work), "--output", work / "samples.png")
    return work


def sample_flags(work: Path, *more: object) -> list[object]:
    return [
        *VQ_SIZE,
        *GPT_SIZE,
        "--vq-ckpt",
        work / "vq/checkpoints/0000006.pt",
        "--gpt-ckpt",
        work / "gpt/checkpoints/0000006.pt",
        "--class-labels",
        0,
        2,
        1,
        "--cfg-scale",
        2,
        "--top-k",
        10,
        "--precision",
        "none",
        *more,
    ]


def test_each_stage_leaves_what_the_next_one_needs(chain):
    content = checkpoint.read(chain / "vq/checkpoints/0000006.pt")
    assert {"model", "ema", "optimizer", "steps", "args"} <= content.keys() and content["steps"] == 6
    codes = np.load(chain / "codes/imagenet16_codes/7.npy")
    assert codes.shape == (1, 2, 16) and codes.dtype == np.int64 and codes.max() < 64
    assert np.load(chain / "codes/imagenet16_labels/7.npy").tolist() == [1]
    bits = [e["val/bits_per_token"] for e in read_metrics(chain / "gpt/metrics.jsonl") if "val/bits_per_token" in e]
    assert len(bits) == 2 and bits[1] < bits[0] < 6.0  # log2(64) = 6 is knowing nothing
    assert Image.open(chain / "samples.png").size == (3 * 18 + 2, 18 + 2)


def test_the_second_view_is_the_code_of_the_mirrored_image(chain, tmp_path):
    mirrored = shutil.copytree(chain / "images", tmp_path / "mirrored")
    for path in mirrored.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    extract(chain, tmp_path, images=mirrored)
    for i in range(12):
        here, there = load(chain / "codes", i), load(tmp_path / "codes", i)
        assert (here[0, 1] == there[0, 0]).mean() > 0.9 and (here[0, 0] == there[0, 1]).mean() > 0.9


def extract(chain: Path, work: Path, *flags: object, images: Path | None = None, **how) -> str:
    return run(
        EXTRACT,
        *VQ_SIZE,
        "--vq-ckpt",
        chain / "vq/checkpoints/0000006.pt",
        "--data-path",
        images or chain / "images",
        "--code-path",
        work / "codes",
        "--num-workers",
        0,
        "--layout",
        "files",
        *flags,
        **how,
    )


def load(codes: Path, index: int) -> np.ndarray:
    return np.load(codes / f"imagenet16_codes/{index}.npy")


def test_two_processes_and_other_batches_extract_the_same_codes(chain, tmp_path):
    extract(chain, tmp_path, "--batch-size", 5, processes=2)
    assert len(list((tmp_path / "codes/imagenet16_codes").iterdir())) == 12
    assert all(np.array_equal(load(chain / "codes", i), load(tmp_path / "codes", i)) for i in range(12))


def test_extraction_goes_on_where_it_stopped(chain, tmp_path):
    shutil.copytree(chain / "codes", tmp_path / "codes")
    before = {i: (tmp_path / f"codes/imagenet16_codes/{i}.npy").stat().st_mtime_ns for i in range(12)}
    (tmp_path / "codes/imagenet16_codes/4.npy").unlink()
    extract(chain, tmp_path)
    after = {i: (tmp_path / f"codes/imagenet16_codes/{i}.npy").stat().st_mtime_ns for i in range(12)}
    assert [i for i in range(12) if before[i] != after[i]] == [4]
    assert np.array_equal(load(chain / "codes", 4), load(tmp_path / "codes", 4))


def test_broken_images_are_left_out_and_listed_up_to_a_share(chain, tmp_path):
    images = shutil.copytree(chain / "images", tmp_path / "images")
    (images / "green" / "1.png").write_bytes(b"no picture")
    (images / "green" / "notes.txt").write_text("not an image file either")
    printed = extract(chain, tmp_path, images=images, code=2)
    assert "1 of 12 items cannot be read" in printed and "Traceback" not in printed
    printed = extract(chain, tmp_path, "--max-bad-share", 0.1, images=images)
    assert "1 images could not be read and have no codes: [5]" in printed
    assert not (tmp_path / "codes/imagenet16_codes/5.npy").exists()
    assert np.array_equal(load(chain / "codes", 6), load(tmp_path / "codes", 6))  # the others keep their numbers
    flags = [*GPT_FLAGS, "--code-path", tmp_path / "codes", "--max-steps", 1, "--run-dir", tmp_path / "gpt"]
    assert "contains 11 images" in run(TRAIN, *flags)
    flags = [*VQ_FLAGS, "--data-path", images, "--max-steps", 3, "--run-dir", tmp_path / "vq"]
    run(VQ_TRAIN, *flags, "--max-bad-share", 0.1)


def test_codes_that_do_not_fit_the_flags_are_found_before_training(chain, tmp_path):
    for flags, message in [
        (["--vocab-size", 20], "must hold values of 0 to 19"),
        (["--num-classes", 2], "must hold values of 0 to 1"),
        (["--image-size", 16, "--downsample-size", 8], "16 codes an image"),
    ]:
        line = [*GPT_FLAGS, "--code-path", chain / "codes", *flags, "--run-dir", tmp_path / "gpt"]
        assert message in refused(TRAIN, *line)
    assert not (tmp_path / "gpt").exists()


def test_codes_of_two_tokenizers_are_never_mixed(chain, tmp_path):
    shutil.copytree(chain / "codes", tmp_path / "codes")
    other = checkpoint.read(chain / "vq/checkpoints/0000006.pt")
    other["ema"]["quantize.embedding.weight"] += 0.1
    checkpoint.save(other, tmp_path / "other.pt")
    flags = [
        *VQ_SIZE,
        "--vq-ckpt",
        tmp_path / "other.pt",
        "--data-path",
        chain / "images",
        "--code-path",
        tmp_path / "codes",
        "--layout",
        "files",
    ]
    assert "tokenizer_sha256" in refused(EXTRACT, *flags)


def test_ten_crops_make_ten_rows(chain, tmp_path):
    extract(chain, tmp_path, "--ten-crop", "--crop-range", 1.1)
    assert load(tmp_path / "codes", 0).shape == (1, 10, 16)


def test_two_processes_train_the_gpt_like_one(chain, tmp_path):
    plain = [
        "--dropout-p",
        0,
        "--token-dropout-p",
        0,
        "--class-dropout-prob",
        0,
        "--max-steps",
        3,
        "--code-path",
        chain / "codes",
        "--lr",
        1e-3,
    ]
    for processes in (1, 2):
        flags = [*GPT_FLAGS, *plain, "--run-dir", tmp_path / str(processes)]
        command_in_processes(processes, train_c2i, train_c2i.train, *flags)
    one, two = (weights(tmp_path / str(p) / "checkpoints/0000003.pt") for p in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)
    losses = [[e["loss"] for e in read_metrics(tmp_path / str(p) / "metrics.jsonl")] for p in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.state_dict_of(checkpoint.read(path), path)


def test_two_processes_train_the_tokenizer_like_one_with_a_discriminator(chain, tmp_path):
    flags = [
        *VQ_FLAGS,
        "--data-path",
        chain / "images",
        "--max-steps",
        2,
        "--disc-weight",
        0.5,
        "--disc-start",
        0,
        "--disc-type",
        "stylegan",
        "--codebook-init",
        "kmeans",
    ]
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        command_in_processes(processes, vq_train, vq_train.train, *flags, "--run-dir", run_dir)
    one, two = (checkpoint.read(tmp_path / str(p) / "checkpoints/0000002.pt") for p in (1, 2))
    for part in ("model", "discriminator"):
        same = [torch.allclose(one[part][k], two[part][k], atol=1e-3) for k in one[part] if "codebook_used" not in k]
        assert np.mean(same) > 0.95, part  # Adam turns a gradient of rounding noise into a whole step


def test_pictures_do_not_depend_on_the_batch(chain, tmp_path):
    run(SAMPLE, *sample_flags(chain), "--batch-size", 2, "--output", tmp_path / "samples.png")
    assert np.array_equal(pixels(tmp_path / "samples.png"), pixels(chain / "samples.png"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pictures_carry_their_settings_and_classes_go_by_name(chain, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(["blue", "green", "red"]))
    flags = [*sample_flags(chain), "--class-names", tmp_path / "names.json", "--class-labels", "blue", "red", "green"]
    run(SAMPLE, *flags, "--output", tmp_path / "named.png")
    assert np.array_equal(pixels(tmp_path / "named.png"), pixels(chain / "samples.png"))
    text = Image.open(tmp_path / "named.png").text
    assert json.loads(text["class_ids"]) == [0, 2, 1]
    assert json.loads(text["settings"])["cfg_scale"] == 2.0


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (VQ_TRAIN, ["--data-path", "/absent"], "/absent"),
        (TRAIN, ["--code-path", "/absent", "--image-size", "250"], "/absent"),
        (SAMPLE, ["--num-classes", "10"], "out of range"),
        (SAMPLE, ["--class-labels", "cat"], "unknown class 'cat'"),
        (SAMPLE, ["--class-labels", "1"], "--vq-ckpt is missing"),
        (SAMPLE, ["--class-labels", "1", "--vq-ckpt", "/absent.pt"], "no checkpoint at /absent.pt"),
        (
            EXTRACT,
            ["--data-path", "/absent", "--code-path", "x", "--vq-ckpt", "/absent.pt"],
            "no checkpoint at /absent.pt",
        ),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(script, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, line = refused(script, *flags).splitlines()
    assert line.startswith("error: ") and message in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_users_mistake_ends_the_process_without_a_traceback(tmp_path):
    printed = run(str(ROOT / VQ_TRAIN), "--data-path", "/absent", code=2, cwd=tmp_path)
    assert "/absent" in printed and "Traceback" not in printed


def test_a_checkpoint_of_another_size_is_named(chain, tmp_path):
    flags = sample_flags(chain, "--gpt-model", "GPT-S")
    assert "it would fit --gpt-model GPT-XS" in refused(SAMPLE, *flags, "--output", tmp_path / "x.png")
    flags = sample_flags(chain, "--vq-model", "VQ-16")
    said = refused(SAMPLE, *flags, "--output", tmp_path / "x.png")
    assert "it would fit --vq-model VQ-4-S --codebook-size 64" in said
