"""How fast codes are read: one file per image against a packed store, with cold and with warm caches.

    python -m benchmarks.data            20,000 images, ten views of 576 codes (384 pixels, stride 16)
    python -m benchmarks.data --quick    20,000 images, ten views of 256 codes

Both layouts hold the same random codes. Items are read in one random order through the data sets that training uses,
by one process without loader workers. Cold: the pages of all files are dropped from the page cache before. The last
line is one JSON object; `speedup` is packed over files, samples per second, warm.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from dataset.codes import CodeFolder
from dataset.imagenet import CodeDataset, build_imagenet_code
from dataset.packing import PackedWriter
from utils.args import make_parser
from utils.errors import run
from utils.progress import progress

IMAGE_SIZE, CODEBOOK, CLASSES = 384, 16384, 1000
_SECONDS = 3.0  # a pass that takes longer is cut off


def write_both(folder: Path, images: int, views: int, tokens: int) -> None:
    """The same random codes as files in `folder`/files and as a packed store in `folder`/packed."""
    generator = np.random.default_rng(0)
    files = CodeFolder.named(folder / "files", "imagenet", IMAGE_SIZE)
    for place in (files.codes, files.labels):
        place.mkdir(parents=True)
    store = PackedWriter(
        folder / "packed" / f"imagenet{IMAGE_SIZE}_packed", "class", images=images, views=views, tokens=tokens,
        codebook_size=CODEBOOK, settings={"image_size": IMAGE_SIZE},
    )  # fmt: skip
    store.claim()
    with progress(images, "image", what="write") as bar:
        for number, rows in enumerate(store.shards):
            codes = generator.integers(0, CODEBOOK, (len(rows), views, tokens))
            labels = generator.integers(0, CLASSES, len(rows))
            store.write(number, codes, labels)
            for index, own, label in zip(rows, codes, labels):
                np.save(files.labels / f"{index}.npy", label[None])
                np.save(files.codes / f"{index}.npy", own[None])
            bar.update(len(rows))
    store.finish()


def disk_use(folder: Path) -> tuple[int, int]:
    """Bytes that the files of `folder` occupy on the disk, and how many files they are."""
    sizes = [path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the pages of all files in `folder`; nothing may hold them mapped."""
    gc.collect()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def samples_per_second(codes: CodeDataset, order: Iterable[int], seconds: float = _SECONDS) -> float:
    """Items read in `order`, for `seconds` at most."""
    count, start = 0, time.perf_counter()
    for index in order:
        codes[index]
        count += 1
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def open_codes(folder: Path) -> CodeDataset:
    """The data set of training, with the checks of training."""
    limits = {"vocab_size": CODEBOOK, "num_classes": CLASSES}
    return build_imagenet_code(argparse.Namespace(code_path=folder, image_size=IMAGE_SIZE, **limits))


def measure(folder: Path, images: int) -> dict[str, float]:
    """Samples per second, megabytes and files of the codes in `folder`."""
    size, files = disk_use(folder)
    order = np.random.default_rng(1).permutation(images).tolist()
    torch.manual_seed(0)
    drop_from_cache(folder)
    cold = samples_per_second(open_codes(folder), order)
    warm = open_codes(folder)
    samples_per_second(warm, order)  # fills the cache
    best = max(samples_per_second(warm, order) for _ in range(3))
    return {"cold": round(cold), "warm": round(best), "megabytes": round(size / 1e6, 1), "files": files}


def benchmark(images: int, views: int, tokens: int, parent: Path | None = None) -> dict[str, Any]:
    """Write, measure and remove both layouts."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        write_both(folder, images, views, tokens)
        os.sync()  # pages that are not on the disk yet would stay in the cache
        results = {layout: measure(folder / layout, images) for layout in ("files", "packed")}
    for layout, numbers in results.items():
        print(
            f"{layout:7} {numbers['cold']:>9,} samples/s cold {numbers['warm']:>9,} warm "
            f"{numbers['megabytes']:>9,.1f} MB on the disk in {numbers['files']:,} files"
        )
    files, packed = results["files"], results["packed"]
    return {
        "images": images, "views": views, "tokens": tokens, **results,
        "speedup": round(packed["warm"] / files["warm"], 2), "speedup_cold": round(packed["cold"] / files["cold"], 2),
        "disk_ratio": round(packed["megabytes"] / files["megabytes"], 3),
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument(
        "--quick", action="store_true", help="20,000 images of 256 codes a view, where the flags below are not given"
    )
    flags.add_argument("--images", type=int, help="number of images; the default is 20,000")
    flags.add_argument("--views", type=int, default=10, help="views of each image")
    flags.add_argument("--tokens", type=int, help="codes of each view; the default is 576")
    flags.add_argument("--folder", type=Path, help="where to write; the default is the system's temporary folder")
    return flags


def main() -> None:
    """Run the benchmark and print its numbers."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    images, tokens = (20_000, 256) if args.quick else (20_000, 576)
    print(json.dumps(benchmark(args.images or images, args.views, args.tokens or tokens, args.folder)))


if __name__ == "__main__":
    run(main)
