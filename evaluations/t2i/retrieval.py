"""Do the pictures show what their prompts say? Find each one's nearest drawing and see whether it has that name.

    python3 evaluations/t2i/retrieval.py --samples SAMPLES --data-path LISTS --vq-ckpt VQ.pt --vq-model VQ-4-S

SAMPLES is what sample_t2i_ddp.py wrote (result.jsonl and images/), LISTS holds .jsonl lists of images with captions.
Pictures are compared as the tokenizer sees them: by the distance of their quantized latents. Prompts that are no
caption of the lists are left out. The measure needs no download; it says whether the text is obeyed, not how good the
pictures are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from dataset.augmentation import eval_transform
from dataset.images import read_rgb
from dataset.lists import CaptionLists, list_files, read_table
from tokenizer.build import add_vq_args, load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.args import add_runtime_args, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run
from utils.files import write_json

TOP = (1, 10)


@dataclass(frozen=True)
class Retrieval:
    """Shares of the pictures whose name is among the first k, and what guessing would reach, by k."""

    pictures: int
    gallery: int
    hits: dict[int, float]
    chance: dict[int, float]
    median_rank: float


def ranks(queries: Tensor, gallery: Tensor, matches: Tensor) -> Tensor:
    """How many wrong gallery entries are nearer to each query than its nearest right one, int64 (Q,).

    `queries` (Q, D) and `gallery` (N, D) are features, `matches` bool (Q, N) says which entries are right; each query
    has at least one.
    """
    distances = torch.cdist(queries, gallery)
    best = distances.masked_fill(~matches, math.inf).min(dim=1, keepdim=True).values
    return ((distances < best) & ~matches).sum(dim=1)


def chance_of_hit(matching: int, total: int, k: int) -> float:
    """The probability that k entries drawn from `total` without replacement hold one of `matching`."""
    return 1 - math.comb(total - matching, k) / math.comb(total, k)


def retrieve(queries: Tensor, prompts: Sequence[str], gallery: Tensor, captions: Sequence[str]) -> Retrieval:
    """Compare the pictures of `prompts` with the gallery of `captions`; every prompt is one of the captions."""
    matches = torch.tensor([[prompt == caption for caption in captions] for prompt in prompts])
    found, total = ranks(queries, gallery, matches), len(captions)
    top = [k for k in TOP if k < total]
    return Retrieval(
        pictures=len(prompts),
        gallery=total,
        hits={k: float((found < k).double().mean()) for k in top},
        chance={k: sum(chance_of_hit(m, total, k) for m in matches.sum(1).tolist()) / len(prompts) for k in top},
        median_rank=float(found.double().quantile(0.5)) + 1,
    )


@torch.no_grad()
def latents(tokenizer: VQModel, files: Sequence[Path], size: int, device: torch.device, batch: int = 64) -> Tensor:
    """Quantized latents of picture files, flattened: (N, width * rows * columns) on the CPU."""
    transform = eval_transform(size)
    parts = []
    for first in range(0, len(files), batch):
        images = torch.stack([transform(read_rgb(file)) for file in files[first : first + batch]])
        parts.append(tokenizer.encode(images.to(device))[0].flatten(1).cpu())
    return torch.cat(parts)


def evaluate(args: argparse.Namespace) -> Retrieval:
    """Retrieval of the pictures of ``args.samples`` among the images of ``args.data_path``.

    Raises:
        FileNotFoundError: when there are no samples.
        ValueError: when none of their prompts is a caption of the lists.
    """
    table = Path(args.samples, "result.jsonl")
    if not table.is_file():
        raise FileNotFoundError(f"{args.samples} has no result.jsonl; expected a folder that sample_t2i_ddp.py wrote")
    records = list(CaptionLists(list_files(args.data_path)))
    captions = [record.caption() for record in records]
    known = set(captions)
    samples = [(row["text"], Path(args.samples, "images", Path(row["image_path"]).name)) for row in read_table(table)]
    samples = [(text, file) for text, file in samples if text in known]
    if not samples:
        raise ValueError(f"none of the prompts in {table} is a caption of the lists in {args.data_path}")
    with process_group(args.device) as device:
        tokenizer = load_tokenizer(args, device)
        queries = latents(tokenizer, [file for _, file in samples], args.image_size, device)
        gallery = latents(tokenizer, [record.image_file for record in records], args.image_size, device)
    return retrieve(queries, [text for text, _ in samples], gallery, captions)


def main(args: argparse.Namespace) -> None:
    """Print the shares and write them as JSON."""
    apply_threads(args)
    result = evaluate(args)
    print(
        f"{result.pictures} pictures, {result.gallery} drawings; the right one has the median rank "
        f"{result.median_rank:.0f}"
    )
    for k, share in result.hits.items():
        print(
            f"right name among the nearest {k}: {share:.1%}, by chance {result.chance[k]:.2%} "
            f"({share / result.chance[k]:.1f} times)"
        )
    write_json(args.output or Path(args.samples, "retrieval.json"), asdict(result))


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--samples", required=True, help="folder that sample_t2i_ddp.py wrote")
    flags.add_argument("--data-path", required=True, help="folder of .jsonl lists with the drawings to compare with")
    flags.add_argument("--image-size", type=int, default=32, help="pixels at which pictures are compared")
    flags.add_argument("--output", help="JSON file; the default is retrieval.json in --samples")
    add_vq_args(flags, ckpt_required=True)
    add_runtime_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
