"""Extraction of codes from JPEG files as the command does it, and both loaders without a GPU's work."""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from autoregressive.train import extract_codes_c2i, train_c2i
from autoregressive.train.extraction import Job, load_fitting_tokenizer
from autoregressive.train.inputs import make_inputs
from benchmarks.gpu.context import Context
from benchmarks.gpu.tokenizer import random_tokenizer
from benchmarks.gpu.training import write_codes
from dataset.augmentation import extraction_transform
from dataset.build import build_dataset
from dataset.images import NumberedImages, collate_numbered
from dataset.sampler import training_loader
from utils import checkpoint
from utils.args import num_workers
from utils.precision import allow_tf32

_CLASSES = 4
_DIFFERENT = 40  # contents that are made; each is in many files


def run(context: Context) -> None:
    """Extraction first, then the loaders."""
    allow_tf32()
    count, views = (1000, 10) if not context.tiny else (12, 10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder / "images", count)
        args = extraction_args(context, folder)
        for precision in ("tf32", "exact"):
            with context.attempt(f"ten-crop extraction, {precision}"):
                extract(context, argparse.Namespace(**{**vars(args), "encode_precision": precision}), views)
        with context.attempt("image loader"):
            load_images(context, args)
        with context.attempt("code loader"):
            load_codes(context, folder)


def write_jpegs(folder: Path, count: int) -> None:
    """`count` JPEG files of 500 x 375 pixels and about the size of ImageNet's, in class folders."""
    random = np.random.default_rng(0)
    contents = [_jpeg(random) for _ in range(min(_DIFFERENT, count))]
    for number in range(count):
        file = folder / f"class{number % _CLASSES}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[number % len(contents)])


def _jpeg(random: np.random.Generator) -> bytes:
    """Smooth areas with some noise: about 100 kB."""
    coarse = Image.fromarray(random.integers(256, size=(24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.float32)
    noisy = smooth + random.normal(scale=8, size=smooth.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, format="JPEG", quality=90)
    return file.getvalue()


def extraction_args(context: Context, folder: Path) -> argparse.Namespace:
    """The flags of `extract_codes_c2i.py`, with a tokenizer of random weights."""
    checkpoint.save({"model": random_tokenizer(context).state_dict()}, folder / "vq.pt")
    size, model, workers = ("256", "VQ-16", "16") if not context.tiny else ("16", "VQ-4-S", "1")
    flags = ["--data-path", str(folder / "images"), "--code-path", str(folder / "codes"), "--ten-crop"]
    flags += ["--image-size", size, "--vq-model", model, "--vq-ckpt", str(folder / "vq.pt"), "--num-workers", workers]
    return extract_codes_c2i.parser().parse_args([*flags, "--batch-size", "16" if not context.tiny else "3"])


def _numbered(args: argparse.Namespace) -> NumberedImages:
    transform = extraction_transform(args.image_size, args.ten_crop, args.crop_range)
    return NumberedImages(build_dataset(args, transform=transform), args.max_bad_share)


def extract(context: Context, args: argparse.Namespace, views: int) -> None:
    """Crops per second between the first batch, which starts the workers, and the last; the GPU's idle share."""
    tokenizer = load_fitting_tokenizer(args, context.device)
    crops = torch.rand(args.batch_size, views, 3, args.image_size, args.image_size, device=context.device) * 2 - 1
    job = Job(args, tokenizer, _numbered(args), context.device)
    batch_ms = context.median_ms(lambda: job.encode.of_views(crops), repeats=3, warm_up=1)
    # as many whole batches as fit into a quarter of the time that is left
    most = 1 + int(context.seconds_left / 4 * 1e3 / batch_ms)
    count = min(len(job.images) // args.batch_size, max(most, 3))
    batches = [range(args.batch_size * i, args.batch_size * (i + 1)) for i in range(count)]
    began = time.perf_counter()
    results = job.encoded(batches)
    next(results)
    first = time.perf_counter()
    done = sum(len(batch.indices) for batch in results)
    seconds = time.perf_counter() - first
    busy = batch_ms / 1e3 * (count - 1)
    context.record("ten-crop extraction", precision=args.encode_precision, image_size=args.image_size, images=done,
                   workers=args.num_workers,
                   crops_per_s=done * views / seconds, images_per_s=done / seconds,
                   encode_ms_per_crop=batch_ms / args.batch_size / views, idle_share=max(1 - busy / seconds, 0.0),
                   first_batch_seconds=first - began)  # fmt: skip
    context.check("ten-crop extraction: all images", done == args.batch_size * (count - 1), images=done)


def load_images(context: Context, args: argparse.Namespace) -> None:
    """Images per second of the extraction's loader alone: decoding, resizing, ten crops."""
    images, workers = _numbered(args), num_workers(args)
    batches = [range(i, min(i + args.batch_size, len(images))) for i in range(0, len(images), args.batch_size)]
    loader = DataLoader(
        images, batch_sampler=batches * (3 if not context.tiny else 1), collate_fn=collate_numbered,
        num_workers=workers, pin_memory=context.device.type == "cuda",
    )  # fmt: skip
    speed = _steady_speed(context, loader, lambda batch: len(batch[0]), workers)
    context.record("image loader", workers=workers, images_per_s=speed)


def _steady_speed(context: Context, batches: Iterable[Any], size: Callable[[Any], int], workers: int) -> float:
    """Items per second behind the batches that the workers prepare while the first one is waited for."""
    ahead = 3 * workers if not context.tiny else 1
    found = iter(batches)
    for _ in range(ahead):
        next(found)
    started, done = time.perf_counter(), 0
    for batch in found:
        done += size(batch)
        if context.seconds_left < 6:
            break
    return done / (time.perf_counter() - started)


def load_codes(context: Context, folder: Path) -> None:
    """Images of codes per second of the training's loader alone."""
    size, batch = (256, 256) if not context.tiny else (64, 8)
    write_codes(folder, size, 16384)
    workers = "16" if not context.tiny else "1"
    flags = ["--code-path", str(folder), "--image-size", str(size), "--num-workers", workers]
    args = train_c2i.parser().parse_args([*flags, "--global-batch-size", str(batch)])
    dataset = make_inputs(args, context.device).training_set()
    _, loader = training_loader(dataset, args, context.device)
    batches = itertools.islice(loader, 400 if not context.tiny else 4)
    speed = _steady_speed(context, batches, lambda batch: len(batch[0]), num_workers(args))
    context.record("code loader", workers=num_workers(args), images_per_s=speed, codes_per_s=speed * (size // 16) ** 2)
