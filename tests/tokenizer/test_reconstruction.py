"""Reconstructing data sets: every picture once and exactly, the measures of both modes, restarts, bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.augmentation import center_crop_arr, eval_transform
from dataset.coco import SingleFolderDataset
from dataset.images import ClassFolders
from evaluations.image_quality import psnr, ssim
from tests.commands.shell import run
from tests.tokenizer.conftest import COUNT
from tests.tokenizer.test_vqgan import TINY
from tokenizer.consistencydecoder import reconstruction_cd_ddp
from tokenizer.reconstruction import copy_data_set, quality, reconstruct_data_set
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.vae import reconstruction_vae_ddp
from tokenizer.validation import val_ddp
from tokenizer.vqgan import reconstruction_vqgan_ddp
from tokenizer.vqgan.model import VQModel
from utils import checkpoint
from utils.image import resize_bicubic, to_uint8

SIZE = ["--vq-model", "VQ-4-S", "--codebook-size", "64", "--image-size", "16", "--num-workers", "2"]
NAME = "VQ-4-S-imagenet-size-16-size-16-codebook-size-64-dim-8-seed-0"


def reconstruct(work: Path, samples: Path, *more: object) -> Path:
    line = ["--vq-ckpt", work / "vq.pt", "--data-path", work / "images", "--sample-dir", samples, *SIZE, *more]
    return reconstruct_data_set(
        reconstruction_vq_ddp.parser().parse_args([str(word) for word in line]), reconstruction_vq_ddp.load
    )


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory) -> Path:
    """The folder of one uninterrupted run."""
    return reconstruct(work, tmp_path_factory.mktemp("whole"), "--per-proc-batch-size", 3)


def originals(work: Path, size: int = 16) -> Tensor:
    return torch.stack([image for image, _ in ClassFolders(work / "images", eval_transform(size))])


@torch.no_grad()
def by_hand(tokenizer, images: Tensor) -> Tensor:
    quant, _, (_, _, codes) = tokenizer.encode(images)
    return tokenizer.decode_code(codes, quant.shape)


def npz(folder: Path) -> np.ndarray:
    with np.load(f"{folder}.npz") as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def results(folder: Path) -> dict:
    return json.loads(Path(f"{folder}_results.json").read_text())


def test_every_image_once_in_the_order_of_the_data_set(work, tokenizer, whole):
    expected = to_uint8(by_hand(tokenizer, originals(work))).numpy()
    assert whole.name == NAME
    assert sorted(contents(whole)) == [f"{i:06d}.png" for i in range(COUNT)]
    assert np.abs(npz(whole).astype(int) - expected).max() <= 1  # another memory layout, other roundings
    assert (npz(whole) == expected).mean() > 0.999
    assert len({picture.tobytes() for picture in expected}) == COUNT
    assert all(np.array_equal(np.asarray(Image.open(whole / f"{i:06d}.png")), npz(whole)[i]) for i in range(COUNT))


def test_measures_are_means_over_the_images_in_both_modes(work, whole):
    restored = torch.from_numpy(npz(whole)).permute(0, 3, 1, 2).float() / 255
    reference = (originals(work) + 1) / 2
    established = psnr(restored, reference).mean(), ssim(restored, reference, data_range=2.0).mean()
    text = Path(f"{whole}_results.txt").read_text()
    assert text == f"PSNR: {established[0]:f}, SSIM: {established[1]:f} \n"
    measured = results(whole)
    assert measured["images"] == COUNT
    assert measured["established"]["ssim"] == pytest.approx(established[1].item(), abs=1e-9)
    assert measured["correct"]["psnr"] == pytest.approx(established[0].item(), abs=1e-4)
    assert measured["correct"]["ssim"] == pytest.approx(ssim(restored, reference).mean().item(), abs=1e-5)
    assert measured["correct"]["ssim"] < measured["established"]["ssim"] - 1e-4


def test_the_two_modes_differ_where_the_original_leaves_its_range():
    original = torch.full((1, 3, 8, 8), 1.2)
    measured = quality(torch.ones(1, 3, 8, 8), original)[0]
    assert measured["psnr"] == float("inf")  # as 8-bit pictures both are white
    assert measured["psnr_established"] == pytest.approx(20.0, abs=1e-4)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(work, whole, tmp_path):
    line = ["--vq-ckpt", work / "vq.pt", "--data-path", work / "images", "--sample-dir", tmp_path, *SIZE]
    printed = run("tokenizer/tokenizer_image/reconstruction_vq_ddp.py", *line, "--per-proc-batch-size", 3, processes=2)
    assert contents(tmp_path / NAME) == contents(whole)
    assert Path(f"{tmp_path / NAME}.npz").read_bytes() == Path(f"{whole}.npz").read_bytes()
    assert results(tmp_path / NAME) == results(whole)
    assert printed.count("PSNR: ") == 2 and "established mode" in printed and "correct mode: PSNR" in printed


def test_a_restart_draws_what_is_missing(work, whole, tmp_path):
    folder = reconstruct(work, tmp_path, "--num-images", 5)
    assert len(npz(folder)) == results(folder)["images"] == 5
    for number in (1, 2):
        (folder / f"{number:06d}.png").unlink()
    before = (folder / "000003.png").stat().st_mtime_ns
    assert contents(reconstruct(work, tmp_path)) == contents(whole)
    assert (folder / "000003.png").stat().st_mtime_ns == before
    assert results(folder) == results(whole)


def test_another_checkpoint_does_not_mix_in(work, tmp_path):
    folder = reconstruct(work, tmp_path, "--num-images", 2)
    before = contents(folder)
    other = checkpoint.read(work / "vq.pt")
    other["model"]["decoder.conv_out.bias"] += 0.5
    checkpoint.save({"model": other["model"]}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="vq_sha256"):
        reconstruct(work, tmp_path, "--vq-ckpt", tmp_path / "other.pt")
    tagged = reconstruct(work, tmp_path, "--vq-ckpt", tmp_path / "other.pt", "--run-tag", "other", "--num-images", 2)
    assert tagged.name == f"{NAME}-other" and contents(folder) == before
    assert npz(tagged).mean() > npz(folder).mean()


@pytest.mark.parametrize("antialias", [False, True])
def test_measuring_at_another_size(work, tokenizer, tmp_path, antialias):
    folder = reconstruct(work, tmp_path, "--image-size-eval", 8, *(["--antialias"] if antialias else []))
    assert folder.name == NAME.replace("size-16-size-16", "size-16-size-8")
    images = originals(work)
    small = F.interpolate(images, size=(8, 8), mode="bicubic", antialias=antialias)
    assert small.max() > 1 or antialias  # bicubic overshoots
    expected = to_uint8(resize_bicubic(by_hand(tokenizer, images), 8, antialias))
    assert np.abs(npz(folder).astype(int) - expected.numpy()).max() <= 1
    restored = torch.from_numpy(npz(folder)).permute(0, 3, 1, 2).float() / 255
    assert results(folder)["established"]["psnr"] == pytest.approx(psnr(restored, (small + 1) / 2).mean().item())
    rounded = to_uint8(small).permute(0, 3, 1, 2).float() / 255
    assert results(folder)["correct"]["psnr"] == pytest.approx(psnr(restored, rounded).mean().item())


def test_sizes_that_do_not_fit_are_refused_or_padded(work, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"18 is not a multiple of the tokenizer's stride 4: give 16 or 20, or add"):
        reconstruct(work, tmp_path, "--image-size", 18)
    assert not list(tmp_path.iterdir())
    folder = reconstruct(work, tmp_path, "--image-size", 18, "--pad-to-stride")
    images = originals(work, 18)
    padded = torch.cat([images, images[..., -1:], images[..., -1:]], -1)
    padded = torch.cat([padded, padded[..., -1:, :], padded[..., -1:, :]], -2)
    expected = to_uint8(by_hand(tokenizer, padded)[..., :18, :18]).numpy()
    assert npz(folder).shape == (COUNT, 18, 18, 3)
    assert np.abs(npz(folder).astype(int) - expected).max() <= 1


def test_a_shuffled_npz_is_a_seeded_permutation(work, whole, tmp_path):
    first = npz(reconstruct(work, tmp_path, "--npz-order", "shuffled", "--run-tag", "a"))
    again = npz(reconstruct(work, tmp_path, "--npz-order", "shuffled", "--run-tag", "b"))
    assert np.array_equal(first, again) and not np.array_equal(first, npz(whole))
    assert sorted(p.tobytes() for p in first) == sorted(p.tobytes() for p in npz(whole))


def test_bf16_decoding_is_close_and_encoding_stays_exact(work, whole, tmp_path):
    folder = reconstruct(work, tmp_path, "--decode-precision", "bf16")
    difference = np.abs(npz(folder).astype(int) - npz(whole))
    assert 0 < difference.mean() < 3


def test_mistakes_are_named_and_lose_nothing(work, tmp_path):
    with pytest.raises(ValueError, match=r"--num-images 8: .* has 7 images"):
        reconstruct(work, tmp_path, "--num-images", 8)
    with pytest.raises(ValueError, match="per-proc-batch-size"):
        reconstruct(work, tmp_path, "--per-proc-batch-size", 0)
    with pytest.raises(FileNotFoundError, match="absent"):
        reconstruct(work, tmp_path, "--data-path", work / "absent")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        reconstruct(work, tmp_path, "--vq-ckpt", work / "absent.pt")
    with pytest.raises(checkpoint.CheckpointError, match="--vq-model VQ-4-S --codebook-size 64"):
        reconstruct(work, tmp_path, "--codebook-size", 32)
    with pytest.raises(SystemExit):
        reconstruction_vq_ddp.parser().parse_args(["--data-path", "x"])  # no --vq-ckpt


def test_a_broken_image_is_named_and_the_rest_is_kept(work, tmp_path):
    for name, path in enumerate(sorted((work / "flat").iterdir())):
        (tmp_path / f"{name}.png").write_bytes(path.read_bytes())
    good = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(good[:60])
    flags = ["--dataset", "coco", "--data-path", tmp_path, "--per-proc-batch-size", 2]
    with pytest.raises(ValueError, match=r"cannot read the image .*5\.png"):
        reconstruct(work, tmp_path / "out", *flags)
    (tmp_path / "5.png").write_bytes(good)
    folder = reconstruct(work, tmp_path / "out", *flags)
    assert "-coco-" in folder.name and len(npz(folder)) == COUNT


@pytest.mark.parametrize(("dataset", "data"), [("imagenet", "images"), ("coco", "flat")])
def test_originals_keep_every_pixel(work, tmp_path, dataset, data):
    line = ["--data-path", work / data, "--dataset", dataset, "--sample-dir", tmp_path, "--image-size", 16]
    line += ["--npz-order", "index"]
    folder = copy_data_set(val_ddp.parser().parse_args([str(word) for word in line]))
    assert folder == tmp_path / f"val_{dataset}"
    paths = [path for path, _ in ClassFolders(work / "images").samples]
    if dataset == "coco":
        paths = SingleFolderDataset(work / "flat").image_paths
    crops = [np.asarray(center_crop_arr(Image.open(path).convert("RGB"), 16)) for path in paths]
    assert np.array_equal(npz(folder), np.stack(crops))
    assert not Path(f"{folder}_results.txt").exists()


def vqgan_line(work: Path, samples: Path, *more: object) -> list[str]:
    line = ["--data-path", work / "images", "--sample-dir", samples, "--image-size", 16, "--npz-order", "index", *more]
    return [str(word) for word in line]


def test_taming(vqgan, tmp_path):
    own = ["--vqgan-config", vqgan / "vqgan.yaml", "--vqgan-ckpt", vqgan / "vqgan.pth"]
    command = reconstruction_vqgan_ddp
    folder = reconstruct_data_set(command.parser().parse_args(vqgan_line(vqgan, tmp_path, *own)), command.load)
    assert folder.name == "vqgan_imagenet_f16_16384-imagenet-size-16-seed-0"
    model = VQModel(TINY, 16, 4, ckpt_path=str(vqgan / "vqgan.pth")).eval()
    expected = to_uint8(by_hand(model, originals(vqgan))).numpy()
    assert np.abs(npz(folder).astype(int) - expected).max() <= 1
    assert results(folder)["images"] == COUNT


def test_taming_mistakes(vqgan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = reconstruction_vqgan_ddp

    def refused(error: type[Exception], match: str, *more: object) -> None:
        with pytest.raises(error, match=match):
            reconstruct_data_set(command.parser().parse_args(vqgan_line(vqgan, tmp_path, *more)), command.load)

    own = ["--vqgan-config", vqgan / "vqgan.yaml"]
    default = Path("pretrained_models/vqgan_imagenet_f16_16384/ckpts")
    refused(checkpoint.CheckpointError, rf"vqgan_imagenet_f16_16384 at {default}/last\.pth; give --vqgan-ckpt", *own)
    default.mkdir(parents=True)
    (default / "last.ckpt").write_bytes(b"")
    refused(checkpoint.CheckpointError, r"convert_pytorch_lightning_to_torch\.py .*last\.ckpt", *own)
    refused(checkpoint.CheckpointError, "for another model", *own, "--vqgan-ckpt", vqgan / "vq.pt")
    refused(FileNotFoundError, "no configuration", "--vqgan-config", "absent.yaml")
    for text in ("a: [", "model: 3", "- 1", "model: {params: {n_embed: 3}}"):
        Path("bad.yaml").write_text(text)
        refused(ValueError, r"bad\.yaml", "--vqgan-config", "bad.yaml")


class TestDiffusers:
    """Autoencoders of the diffusers package, on tiny models made here."""

    def run(self, command, work: Path, samples: Path, *more: object) -> Path:
        args = command.parser().parse_args(vqgan_line(work, samples, *more))
        return reconstruct_data_set(args, command.load)

    def test_vae_takes_the_likeliest_latents(self, work, vae, tmp_path):
        import diffusers

        folder = self.run(reconstruction_vae_ddp, work, tmp_path, "--vae-path", vae)
        assert folder.name == "stabilityai-sd-vae-ft-mse-imagenet-size-16-seed-0"
        model = diffusers.AutoencoderKL.from_pretrained(vae).eval()
        with torch.no_grad():
            expected = model.decode(model.encode(originals(work)).latent_dist.mode()).sample
        assert np.abs(npz(folder).astype(int) - to_uint8(expected).numpy()).max() <= 1

    def test_sampled_latents_depend_on_the_image_and_the_seed_alone(self, work, vae, tmp_path):
        flags = ["--vae-path", vae, "--sample-latents"]
        folders = [
            self.run(reconstruction_vae_ddp, work, tmp_path / str(i), *flags, *more)
            for i, more in enumerate((["--per-proc-batch-size", 7], ["--per-proc-batch-size", 2], ["--global-seed", 1]))
        ]
        likeliest = self.run(reconstruction_vae_ddp, work, tmp_path / "mode", "--vae-path", vae)
        same, again, other = (npz(folder) for folder in folders)
        assert np.array_equal(same, again)
        assert not np.array_equal(same, other) and not np.array_equal(same, npz(likeliest))

    def test_consistency_decoder(self, work, decoder, tmp_path):
        folders = [
            self.run(
                reconstruction_cd_ddp, work, tmp_path / str(size), "--cd-path", decoder, "--per-proc-batch-size", size
            )
            for size in (7, 2)
        ]
        assert folders[0].name == "openai-consistencydecoder-imagenet-size-16-seed-0"
        assert np.array_equal(*(npz(folder) for folder in folders))
        seeded = self.run(reconstruction_cd_ddp, work, tmp_path, "--cd-path", decoder, "--global-seed", 3)
        assert not np.array_equal(npz(seeded), npz(folders[0]))

    def test_stride_is_that_of_the_model(self, work, vae, tmp_path):
        with pytest.raises(ValueError, match="17 is not a multiple of the tokenizer's stride 2"):
            self.run(reconstruction_vae_ddp, work, tmp_path, "--vae-path", vae, "--image-size", 17)

    def test_mistakes(self, work, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            self.run(reconstruction_vae_ddp, work, tmp_path, "--vae-path", tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="cannot load the model nobody/nothing"):
            self.run(reconstruction_vae_ddp, work, tmp_path, "--vae-path", "nobody/nothing")
        monkeypatch.setitem(sys.modules, "diffusers", None)
        for command in (reconstruction_vae_ddp, reconstruction_cd_ddp):
            with pytest.raises(ValueError, match="pip install diffusers"):
                self.run(command, work, tmp_path)


COMMON = (
    "--data-path d --dataset coco --sample-dir s --per-proc-batch-size 32 --global-seed 0 --num-workers 4 "
    "--image-size 512"
)
ESTABLISHED = {
    reconstruction_vq_ddp: "--vq-model VQ-8 --vq-ckpt x --codebook-size 16384 --codebook-embed-dim 8 "
    "--image-size-eval 384",
    reconstruction_vqgan_ddp: "--vqgan vqgan_openimage_f8_256",
    reconstruction_vae_ddp: "--vae sdxl-vae",
    reconstruction_cd_ddp: "",
    val_ddp: "",
}


@pytest.mark.parametrize("command", ESTABLISHED, ids=lambda x: x.__name__)
def test_established_flags_and_defaults(command):
    command.parser().parse_args([*COMMON.split(), *ESTABLISHED[command].split()])
    needed = ["--data-path", "d", *(["--vq-ckpt", "x"] if command is reconstruction_vq_ddp else [])]
    args = command.parser().parse_args(needed)
    assert (args.image_size, args.dataset, args.sample_dir) == (256, "imagenet", "reconstructions")
    assert (args.per_proc_batch_size, args.global_seed, args.num_workers) == (32, 0, 4)
    assert args.npz_order == ("index" if command is reconstruction_vq_ddp else "shuffled")
