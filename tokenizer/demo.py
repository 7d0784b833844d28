"""One image through a tokenizer and back: what the single-image demos share."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from dataset.augmentation import center_crop_arr, normalized
from dataset.images import read_rgb
from dataset.openmoji import example_picture
from tokenizer.reconstruction import Load, quality
from utils.args import add_seed_arg
from utils.image import save_png, to_uint8


def add_demo_args(parser: argparse.ArgumentParser, output_dir: str | None) -> None:
    """The image, its size, and where the reconstruction goes."""
    parser.add_argument("--image-path", help="the image; without, a picture that is made here")
    parser.add_argument("--image-size", type=int, default=512, help="edge of the square that is encoded, in pixels")
    parser.add_argument(
        "--output-dir",
        default=output_dir,
        help="folder of the result" + ("" if output_dir else "; the default is the one of the image"),
    )
    parser.add_argument("--device", help="cuda or cpu; the default is a GPU where there is one")
    add_seed_arg(parser, "--seed", dest="global_seed", metavar="SEED")


def show(args: argparse.Namespace, load: Load, suffix: str, *, crop: bool) -> Path:
    """Write the reconstruction of --image-path by the tokenizer of `load` as PNG, and say where it is.

    With `crop` the image is cut to its central square, and so is the result. Without, it is squeezed into a square and
    the result stretched back to the image's own size.

    Raises:
        UnreadableImage: when the image cannot be read.
        ValueError: when --image-size does not fit the stride.
    """
    torch.manual_seed(args.global_seed)
    random.seed(args.global_seed)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load(args, device)
    stride = tokenizer.stride
    if args.image_size < 1 or args.image_size % stride:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of the tokenizer's stride {stride}")
    folder, stem, image = _input(args)
    size = (args.image_size, args.image_size)
    square = center_crop_arr(image, args.image_size) if crop else image.resize(size, Image.Resampling.BICUBIC)
    original = normalized(square)[None].to(device)
    with torch.inference_mode():
        output = tokenizer.reconstruct(original, [0]).float()
    measured = quality(output, original)[0]
    if not crop:
        output = F.interpolate(output, size=(image.height, image.width), mode="bilinear")
    path = folder / f"{stem}_{suffix}.png"
    save_png(to_uint8(output)[0], path)
    print(f"PSNR: {measured['psnr']:.2f}, SSIM: {measured['ssim']:.4f} at {args.image_size} x {args.image_size} pixels")
    print(f"Reconstructed image is saved to {path}")
    return path


def _input(args: argparse.Namespace) -> tuple[Path, str, Image.Image]:
    """Where the result goes, the stem of its name, and the image."""
    if args.image_path:
        path = Path(args.image_path)
        return Path(args.output_dir or path.parent), path.stem, read_rgb(path)
    folder, image = Path(args.output_dir or "output_demo"), example_picture()
    save_png(image, folder / "example.png")
    print(f"no --image-path: {folder / 'example.png'} was made (drawings by OpenMoji, CC BY-SA 4.0)")
    return folder, "example", image
