"""The single-image demos: the right picture in the right place, also without an image of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dataset.augmentation import center_crop_arr, normalized
from dataset.images import UnreadableImage
from dataset.openmoji import example_picture
from tests.commands.shell import run
from tests.tokenizer.test_vqgan import TINY
from tokenizer.consistencydecoder import cd_demo
from tokenizer.tokenizer_image import vq_demo
from tokenizer.vae import sd_vae_demo
from tokenizer.vqgan import taming_vqgan_demo
from tokenizer.vqgan.model import VQModel
from utils.image import to_uint8


@pytest.fixture
def photo(tmp_path) -> Path:
    """A picture of 30 x 20 pixels whose name has two extensions."""
    pixels = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg.PNG")
    return tmp_path / "a.jpg.PNG"


def demo(command, *flags: object) -> Path:
    return command.demo(command.parser().parse_args([str(flag) for flag in flags]))


def vq_flags(work: Path) -> list[object]:
    return ["--vq-model", "VQ-4-S", "--codebook-size", 64, "--vq-ckpt", work / "vq.pt", "--device", "cpu"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@torch.no_grad()
def through(model, image: Image.Image) -> torch.Tensor:
    quant, _, (_, _, codes) = model.encode(normalized(image)[None])
    return model.decode_code(codes, quant.shape)


def test_the_central_square(work, tokenizer, photo, tmp_path, capsys):
    path = demo(vq_demo, *vq_flags(work), "--image-path", photo, "--image-size", 16, "--output-dir", tmp_path / "out")
    assert path == tmp_path / "out/a.jpg_tokenizer_image.png"
    assert capsys.readouterr().out.splitlines()[-1] == f"Reconstructed image is saved to {path}"
    expected = to_uint8(through(tokenizer, center_crop_arr(Image.open(photo), 16)))[0].numpy()
    assert np.abs(pixels(path).astype(int) - expected).max() <= 1
    again = demo(vq_demo, *vq_flags(work), "--image-path", photo, "--image-size", 16, "--output-dir", tmp_path,
                 "--suffix", "x")  # fmt: skip
    assert again.name == "a.jpg_x.png" and np.array_equal(pixels(again), pixels(path))


def test_taming_gives_back_the_size_of_the_image(vqgan, photo, tmp_path):
    before = photo.read_bytes()
    own = ["--vqgan-config", vqgan / "vqgan.yaml", "--vqgan-ckpt", vqgan / "vqgan.pth"]
    path = demo(taming_vqgan_demo, *own, "--image-path", photo, "--image-size", 16)
    assert path == photo.with_name("a.jpg_vqgan.png") and photo.read_bytes() == before
    model = VQModel(TINY, 16, 4, ckpt_path=str(vqgan / "vqgan.pth")).eval()
    square = through(model, Image.open(photo).resize((16, 16), Image.Resampling.BICUBIC))
    expected = to_uint8(F.interpolate(square, size=(20, 30), mode="bilinear"))[0].numpy()
    assert pixels(path).shape == (20, 30, 3)
    assert np.abs(pixels(path).astype(int) - expected).max() <= 1


def test_diffusers(vae, decoder, photo, tmp_path):
    flags = ["--image-path", photo, "--image-size", 16]
    first = pixels(demo(sd_vae_demo, "--vae-path", vae, *flags))
    assert first.shape == (20, 30, 3) and photo.with_name("a.jpg_vae.png").is_file()
    sampled = [pixels(demo(sd_vae_demo, "--vae-path", vae, *flags, "--sample-latents", "--seed", s)) for s in (1, 1, 2)]
    assert np.array_equal(sampled[0], sampled[1]) and not np.array_equal(sampled[0], sampled[2])
    seeded = [pixels(demo(cd_demo, "--cd-path", decoder, *flags, "--seed", s)) for s in (0, 0, 5)]
    assert np.array_equal(seeded[0], seeded[1]) and not np.array_equal(seeded[0], seeded[2])


def test_without_an_image_one_is_made(work, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = demo(vq_demo, *vq_flags(work), "--image-size", 64)
    assert path == Path("output_vq_demo/example_tokenizer_image.png") and "OpenMoji" in capsys.readouterr().out
    example = pixels(Path("output_vq_demo/example.png"))
    assert example.shape == (512, 512, 3) and np.array_equal(example, np.asarray(example_picture()))
    quarters = [example[y : y + 256, x : x + 256] for y in (0, 256) for x in (0, 256)]
    assert all(quarter.std() > 10 and quarter[0, 0].tolist() == [255] * 3 for quarter in quarters)
    expected = to_uint8(through(tokenizer, center_crop_arr(Image.fromarray(example), 64)))[0].numpy()
    assert np.abs(pixels(path).astype(int) - expected).max() <= 1


def test_mistakes_are_named(work, photo, tmp_path):
    with pytest.raises(ValueError, match="18 is not a multiple of the tokenizer's stride 4"):
        demo(vq_demo, *vq_flags(work), "--image-path", photo, "--image-size", 18)
    with pytest.raises(UnreadableImage, match=r"absent\.jpg"):
        demo(vq_demo, *vq_flags(work), "--image-path", "absent.jpg", "--image-size", 16)
    with pytest.raises(SystemExit):
        vq_demo.parser().parse_args([])  # --vq-ckpt is required


ESTABLISHED = {
    vq_demo: "--vq-model VQ-8 --vq-ckpt x --codebook-size 16384 --codebook-embed-dim 8 --output-dir o --suffix s",
    taming_vqgan_demo: "--vqgan vqgan_openimage_f8_256",
    sd_vae_demo: "--vae sdxl-vae",
    cd_demo: "",
}


@pytest.mark.parametrize("command", ESTABLISHED, ids=lambda x: x.__name__)
def test_established_flags(command):
    args = command.parser().parse_args(f"--image-path i --image-size 1024 --seed 0 {ESTABLISHED[command]}".split())
    assert (args.image_path, args.image_size) == ("i", 1024)
    assert command.parser().parse_args(ESTABLISHED[command].split()).image_size == 512


@pytest.mark.slow
def test_the_command_on_a_cpu(work, photo, tmp_path):
    flags = [*vq_flags(work)[:-2], "--image-path", photo, "--image-size", 16, "--output-dir", tmp_path]
    printed = run("tokenizer/tokenizer_image/vq_demo.py", *flags)
    assert printed.splitlines()[-1].startswith("Reconstructed image is saved to ")
    assert "error: --image-size 18" in run("tokenizer/tokenizer_image/vq_demo.py", *flags, "--image-size", 18, code=2)
