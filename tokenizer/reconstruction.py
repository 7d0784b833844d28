"""Reconstructing a data set with any tokenizer: PNGs and an npz for the evaluator, PSNR and SSIM.

The commands are `reconstruction_vq_ddp.py` and its siblings for other tokenizers, and `val_ddp.py` for the originals.
Each says how its tokenizer is loaded; everything else is here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dataset.augmentation import eval_transform
from dataset.build import build_dataset
from dataset.packed import sha256_of
from evaluations.image_quality import psnr, ssim, ssim_established
from evaluations.render import Drawn, beside, read_notes, render
from tokenizer.coding import ImageDecoder
from tokenizer.layers import CodeAutoencoder
from tokenizer.nearest import exact_arithmetic
from utils.args import add_runtime_args, add_seed_arg, apply_threads, num_workers
from utils.checkpoint import file_of
from utils.distributed import barrier, get_world_size, is_main, process_group, read_launch
from utils.files import write_atomic, write_json
from utils.image import resize_bicubic, to_uint8

# Images (B, 3, H, W) in [-1, 1] and their numbers in the data set -> images alike. The numbers seed what is random.
Reconstruct = Callable[[Tensor, Sequence[int]], Tensor]


class Autoencoder(NamedTuple):
    """A tokenizer as this module needs it."""

    name: str
    stride: int  # pixels per latent in each direction; image sizes must be multiples of it
    reconstruct: Reconstruct
    facts: Mapping[str, Any]  # flags that decide its pictures
    weights: Mapping[str, str] = {}  # and files that do: what their SHA-256 is called -> path
    codebook: str = ""  # what its folder's name says of the codebook
    model: Any = None  # the network, where somebody may want its codes


Load = Callable[[argparse.Namespace, torch.device], Autoencoder]


def add_reconstruction_args(parser: argparse.ArgumentParser, *, npz_order: str, padding: bool = True) -> None:
    """Data, size and output: what all reconstruction commands share."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", required=True, help="images, in the layout of --dataset")
    group.add_argument(
        "--dataset", choices=["imagenet", "coco"], default="imagenet", help="imagenet: a folder per class; coco: flat"
    )
    group.add_argument("--image-size", type=int, default=256, help="edge of the centre crops in pixels")
    group.add_argument("--num-images", type=int, help="only the first so many images; the default is all of them")
    if padding:
        group.add_argument(
            "--pad-to-stride",
            action="store_true",
            help="an --image-size that does not fit the stride: repeat the border pixels up to the next that does, "
            "and cut them off the reconstruction",
        )
    output = parser.add_argument_group("output")
    output.add_argument("--sample-dir", default="reconstructions", help="the folder of PNGs and its npz go in here")
    output.add_argument("--run-tag", help="a word after the folder's name, to keep several checkpoints apart")
    output.add_argument("--per-proc-batch-size", type=int, default=32, help="images per process at a time")
    output.add_argument(
        "--npz-order",
        choices=["index", "shuffled"],
        default=npz_order,
        help="order in the npz: by number, or shuffled by --global-seed (the Inception Score depends on it)",
    )
    add_runtime_args(parser)
    parser.set_defaults(num_workers=4)
    add_seed_arg(parser)


def reconstruct_data_set(args: argparse.Namespace, load: Load) -> Path:
    """Write every reconstruction, the npz and the measures; started again, it continues. Returns the PNGs' folder.

    Raises:
        ValueError: a size that does not fit, or pictures of other settings in the folder.
    """
    with images_and_autoencoder(args, load) as (device, images, count, autoencoder):
        padded = padded_size(args, autoencoder.stride)
        size_eval, antialias = eval_size(args), getattr(args, "antialias", False)

        def draw(indices: list[int]) -> Drawn:
            originals = images.get(indices).to(device)
            outputs = _reconstruct_padded(autoencoder.reconstruct, originals, indices, padded)
            if size_eval != args.image_size:
                outputs, originals = (resize_bicubic(x, size_eval, antialias) for x in (outputs, originals))
            return Drawn(to_uint8(outputs), quality(outputs, originals))

        settings = _settings(args, images, autoencoder) | {"image_size_eval": size_eval, "antialias": antialias}
        folder = _render(args, draw, count, folder_name(args, autoencoder), settings | {"padded_to": padded})
        if is_main():
            report(folder, count, settings)
        barrier()
        return folder


def copy_data_set(args: argparse.Namespace) -> Path:
    """Write the centre-cropped originals and their npz: what reconstructions are compared with for rFID."""
    originals = Autoencoder("val", 1, lambda images, _: images, {})
    with images_and_autoencoder(args, lambda *_: originals) as (_, images, count, _):

        def draw(indices: list[int]) -> Drawn:
            return Drawn(to_uint8(images.get(indices)), [{"index": index} for index in indices])

        return _render(args, draw, count, f"val_{args.dataset}", _settings(args, images, originals))


def folder_name(args: argparse.Namespace, autoencoder: Autoencoder) -> str:
    """The name of the folder of reconstructions, as established."""
    size_eval = f"-size-{eval_size(args)}" if hasattr(args, "image_size_eval") else ""
    sizes = f"size-{args.image_size}{size_eval}{autoencoder.codebook}"
    return f"{autoencoder.name}-{args.dataset}-{sizes}-seed-{args.global_seed}"


def eval_size(args: argparse.Namespace) -> int:
    """The edge at which pictures are measured and saved: --image-size-eval, where a command has it."""
    if not hasattr(args, "image_size_eval"):
        return args.image_size
    return min(256, args.image_size) if args.image_size_eval is None else args.image_size_eval


@contextmanager
def images_and_autoencoder(
    args: argparse.Namespace, load: Load
) -> Iterator[tuple[torch.device, Prefetched, int, Autoencoder]]:
    """The device, the images, how many of them count, and the tokenizer."""
    apply_threads(args)
    with process_group(args.device) as device, torch.inference_mode():
        dataset = build_dataset(args, transform=eval_transform(args.image_size))
        count = _count(args, len(dataset))
        with Prefetched(dataset, max(1, num_workers(args, read_launch().local_size))) as images:
            yield device, images, count, load(args, device)


def _count(args: argparse.Namespace, available: int) -> int:
    if args.num_images is not None and not 0 < args.num_images <= available:
        raise ValueError(f"--num-images {args.num_images}: {args.data_path} has {available} images")
    return args.num_images or available


def _render(
    args: argparse.Namespace, draw: Callable[[list[int]], Drawn], count: int, name: str, settings: Mapping[str, Any]
) -> Path:
    if args.per_proc_batch_size < 1:
        raise ValueError(f"--per-proc-batch-size must be at least 1, found {args.per_proc_batch_size}")
    folder = Path(args.sample_dir, f"{name}-{args.run_tag}" if args.run_tag else name)
    seed = args.global_seed if args.npz_order == "shuffled" else None
    return render(draw, count, folder, batch_size=args.per_proc_batch_size, settings=settings, order_seed=seed)


def _settings(args: argparse.Namespace, images: Prefetched, autoencoder: Autoencoder) -> dict[str, Any]:
    """What decides the pictures; a folder of others is refused. Weights are known by their content."""
    hashes = {name: sha256_of(file_of(path)) for name, path in autoencoder.weights.items() if is_main()}
    return {
        "data_path": str(Path(args.data_path).resolve()),
        "dataset": args.dataset,
        "images": len(images.dataset),  # type: ignore[arg-type]
        "image_size": args.image_size,
        **autoencoder.facts,
        **hashes,
    }


def padded_size(args: argparse.Namespace, stride: int) -> int:
    """The edge to which images are padded: --image-size, or with --pad-to-stride the next multiple of `stride`."""
    if args.image_size < 1:
        raise ValueError(f"--image-size must be positive, found {args.image_size}")
    padded = math.ceil(args.image_size / stride) * stride
    if padded != args.image_size and not args.pad_to_stride:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of the tokenizer's stride {stride}: give "
            f"{padded - stride or padded} or {padded}, or add --pad-to-stride"
        )
    return padded


def _reconstruct_padded(reconstruct: Reconstruct, images: Tensor, indices: Sequence[int], padded: int) -> Tensor:
    """`reconstruct`, with the border repeated at the right and below up to `padded` pixels and cut off again."""
    edge = images.shape[-1]
    return reconstruct(pad_to(images, padded), indices)[..., :edge, :edge].float()


def pad_to(images: Tensor, edge: int) -> Tensor:
    """Images (B, 3, H, H) with the border repeated at the right and below up to `edge` pixels."""
    missing = edge - images.shape[-1]
    return F.pad(images, (0, missing, 0, missing), mode="replicate") if missing else images


def quality(outputs: Tensor, originals: Tensor) -> list[dict[str, float]]:
    """PSNR and SSIM of images (B, 3, H, W) in [-1, 1], for each image, in two modes.

    ``psnr`` and ``ssim`` compare the two as 8-bit pictures with a data range of 1. The ``_established`` ones are those
    of the published tables: the original is neither clamped nor rounded (only resizing makes that a difference), and
    SSIM takes a data range of 2.
    """
    restored = to_uint8(outputs).permute(0, 3, 1, 2).float() / 255
    reference = to_uint8(originals).permute(0, 3, 1, 2).float() / 255
    unrounded = (originals + 1) / 2
    measures = {
        "psnr": psnr(restored, reference),
        "ssim": ssim(restored, reference),
        "psnr_established": psnr(restored, unrounded),
        "ssim_established": ssim_established(restored, unrounded),
    }
    columns = [values.tolist() for values in measures.values()]
    return [dict(zip(measures, row)) for row in zip(*columns)]


def report(folder: Path, count: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Print the means over pictures 0 to `count` - 1 and write them beside `folder`.

    ``{folder}_results.txt`` holds the established line, ``{folder}_results.json`` both modes.
    """
    sums = dict.fromkeys(("psnr", "ssim", "psnr_established", "ssim_established"), 0.0)
    for notes in read_notes(folder, count):
        sums = {name: total + float(notes[name]) for name, total in sums.items()}
    means = {name: total / count for name, total in sums.items()}
    line = f"PSNR: {means['psnr_established']:f}, SSIM: {means['ssim_established']:f} "
    print(line)
    print(f"  the line above is the established mode (SSIM with a data range of 2), over {count:,} images")
    print(f"  correct mode: PSNR: {means['psnr']:f}, SSIM: {means['ssim']:f}")
    write_atomic(beside(folder, "_results.txt"), lambda file: file.write(f"{line}\n".encode()))
    finite = {name: value if math.isfinite(value) else None for name, value in means.items()}
    results = {
        "images": count,
        "established": {"psnr": finite["psnr_established"], "ssim": finite["ssim_established"]},
        "correct": {"psnr": finite["psnr"], "ssim": finite["ssim"]},
        "settings": dict(settings),
    }
    write_json(beside(folder, "_results.json"), results)
    return results


class Prefetched:
    """Images of a data set by their numbers, read by threads; the next batch is read while this one is worked on.

    The next batch is guessed: each of the other processes takes one of this size first. A wrong guess costs time alone.
    """

    def __init__(self, dataset: Dataset, threads: int) -> None:
        self.dataset = dataset
        self._pool = ThreadPoolExecutor(threads)
        self._pending: dict[int, Future] = {}

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get(self, indices: Sequence[int]) -> Tensor:
        """The images (B, 3, H, W) of `indices`."""
        known = self._pending
        wanted = {index: known.get(index) or self._pool.submit(self._read, index) for index in indices}
        first = indices[-1] + 1 + (get_world_size() - 1) * len(indices)
        guess = range(first, min(first + len(indices), len(self.dataset)))  # type: ignore[arg-type]
        self._pending = {index: known.get(index) or self._pool.submit(self._read, index) for index in guess}
        return torch.stack([future.result() for future in wanted.values()])

    def _read(self, index: int) -> Tensor:
        return self.dataset[index][0]


def code_autoencoder(model: CodeAutoencoder, device: torch.device, decode_precision: str = "none") -> Reconstruct:
    """Through the codes of a VQ model of either family, as they would be stored: always encoded in float32.

    With the precision "none" decoding is without TF32 too, and in batches of the caller.
    """
    decode = None if decode_precision == "none" else ImageDecoder(model, decode_precision)

    def reconstruct(images: Tensor, _: Sequence[int]) -> Tensor:
        with exact_arithmetic(device.type):
            quant, _, (_, _, codes) = model.encode(images)
            if decode is None:
                return model.decode_code(codes, quant.shape)
        return decode(codes.view(len(images), -1), quant.shape[2:])

    return reconstruct
