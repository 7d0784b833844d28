"""Decode extracted codes into a picture, to see that they show what they should.

    python3 tools/check_image_codes.py --vq-ckpt VQ.pt --code-path CODES/imagenet256_codes/0.npy
    python3 tools/check_image_codes.py --vq-ckpt VQ.pt --code-path CODES --image-size 384

A single file gives a grid of all its views; a packed store, or a folder with codes of either layout, gives random
entries. The picture is sample_image_code.png in the working directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from dataset.codes import read_array
from dataset.imagenet import build_imagenet_code
from dataset.packed import CaptionCodes, find_stores, read_manifest, sha256_of
from tokenizer.build import add_vq_args, load_tokenizer
from tokenizer.coding import decode_codes
from utils import checkpoint
from utils.args import add_seed_arg, make_parser
from utils.errors import run
from utils.image import make_grid_image, save_png

PICTURE = "sample_image_code.png"


def codes_of_file(path: Path) -> tuple[Tensor, int]:
    """The codes (A, T) of one .npy file, (1, A, T) or (1, T), and the columns of their grid.

    Raises:
        ValueError: when it is unreadable or of another shape.
    """
    codes = read_array(path)
    if codes.ndim not in (2, 3) or len(codes) != 1 or not codes.size:
        raise ValueError(f"{path} must have the shape (1, views, tokens) or (1, tokens), found {codes.shape}")
    return torch.from_numpy(codes.astype(np.int64)).reshape(-1, codes.shape[-1]), max(4, codes.shape[1] // 2)


def random_codes(path: Path, image_size: int, count: int, seed: int, vq_ckpt: str) -> tuple[Tensor, int]:
    """The codes (B, T) of up to `count` random entries below `path`, and the columns of their grid.

    Raises:
        FileNotFoundError: when there are no codes.
        ValueError: when they were made by another tokenizer than `vq_ckpt`.
    """
    manifests = [read_manifest(folder) for folder in find_stores(path)]
    made_by = {manifest.get("tokenizer_sha256") for manifest in manifests} - {None}
    if made_by and made_by != {sha256_of(checkpoint.file_of(vq_ckpt))}:
        raise ValueError(f"the codes in {path} were made by another tokenizer than {vq_ckpt}; give the one they are of")
    generator = np.random.default_rng(seed)
    if any(manifest["kind"] == "caption" for manifest in manifests):
        captions = CaptionCodes(path)
        places = generator.permutation(len(captions))[:count]
        codes = [torch.from_numpy(captions.read(*captions.keys[place])[0]) for place in places]
    else:
        dataset = build_imagenet_code(argparse.Namespace(code_path=path, image_size=image_size))
        places = generator.permutation(len(dataset))[:count].tolist()
        codes = [dataset.view(place, generator.integers(dataset.num_views))[0] for place in places]
    return torch.stack(codes), max(4, round(count**0.5))


def check(args: argparse.Namespace) -> None:
    """Write the picture."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args, device)
    if args.code_path.is_dir():
        codes, columns = random_codes(args.code_path, args.image_size, args.num_images, args.seed, args.vq_ckpt)
    else:
        codes, columns = codes_of_file(args.code_path)
    grid, codebook = args.image_size // args.downsample_size, tokenizer.config.codebook_size
    if codes.shape[1] != grid**2:
        raise ValueError(
            f"{args.code_path} holds {codes.shape[1]} codes an image; --image-size {args.image_size} with "
            f"--downsample-size {args.downsample_size} makes {grid} x {grid} = {grid**2}"
        )
    if codes.min() < 0 or codes.max() >= codebook:
        raise ValueError(
            f"{args.code_path} holds codes from {codes.min()} to {codes.max()}, the codebook has {codebook}"
        )
    images = decode_codes(tokenizer, codes.to(device))
    save_png(make_grid_image(images, columns), PICTURE)
    print(f"{len(images)} images are in {PICTURE}")


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--code-path", type=Path, required=True, help="one .npy file, a store, or a folder of codes")
    flags.add_argument("--num-images", type=int, default=16, help="random entries to show of a store or folder")
    add_vq_args(flags, ckpt_required=True)
    flags.add_argument("--image-size", type=int, default=256, help="edge of the images in pixels")
    flags.add_argument("--downsample-size", type=int, default=16, help="the tokenizer's stride")
    add_seed_arg(flags, "--seed", help="decides which entries are shown")
    return flags


if __name__ == "__main__":
    run(lambda: check(parser().parse_args()))
