"""Draw pictures of prompts with a trained GPT, a tokenizer and the text encoder that the GPT was trained with.

    python3 autoregressive/sample/sample_t2i.py --gpt-model GPT-XL --gpt-ckpt t2i_XL_stage2_512.pt \
        --vq-ckpt vq_ds16_t2i.pt --image-size 512 --prompts "a red cat" "two dogs in the snow" --images-per-prompt 4

Writes a grid, and with --output-dir every picture as a file of its own. Image number i depends on the checkpoints, the
settings, --seed and i alone: it is the first image of its prompt with --seed SEED+i.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from autoregressive.sample.painter import Painter, Subject, add_picture_args
from autoregressive.sample.pipeline import OnToken, add_model_args, load_models, make_decoder, sample_codes
from autoregressive.sample.text import PROMPTS, TextConditions, add_text_args
from dataset.prompts import read_prompts
from utils.args import add_seed_arg, apply_threads, make_parser
from utils.distributed import process_group
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    what = add_picture_args(flags, "sample_t2i.png", "prompt")
    what.add_argument("--prompts", nargs="+", help="texts; the default is four built-in ones")
    what.add_argument("--prompt-file", help="texts from .txt (one a line), .csv, .tsv, .jsonl or .parquet")
    add_text_args(flags)
    add_model_args(flags, cfg_scale=7.5, top_k=1000, gpt_type="t2i", image_size=512)
    add_seed_arg(flags, "--seed")
    flags.add_argument(
        "--legacy-rng", action="store_true", help="draw from the global generator, as upstream's seeds do"
    )
    return flags


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts that the flags give, each repeated --images-per-prompt times."""
    if args.images_per_prompt < 1 or args.batch_size < 1 or args.columns < 1:
        raise ValueError("--images-per-prompt, --batch-size and --columns are at least 1")
    prompts = [*(args.prompts or []), *(read_prompts(args.prompt_file) if args.prompt_file else [])]
    return [prompt for prompt in prompts or PROMPTS for _ in range(args.images_per_prompt)]


def main(args: argparse.Namespace) -> None:
    """Load the models, draw, decode, and write the pictures."""
    apply_threads(args)
    prompts = prompts_of(args)
    with process_group(args.device) as device:
        conditions = TextConditions(args, device)
        gpt, tokenizer = load_models(args, device, "t2i")
        for number, count in enumerate(conditions.token_counts(list(dict.fromkeys(prompts)))):
            print(f"prompt {number} token len: {count}")

        def draw(numbers: list[int], on_token: OnToken) -> Tensor:
            seeds = None if args.legacy_rng else [args.seed + i for i in numbers]
            return sample_codes(
                gpt, args=args, seeds=seeds, on_token=on_token, **conditions([prompts[i] for i in numbers])
            )

        subjects = [Subject(prompt, {"prompt": prompt}) for prompt in prompts]
        painter = Painter(args, subjects, draw, make_decoder(args, tokenizer), gpt.block_size)
        torch.manual_seed(args.seed)
        started = time.perf_counter()
        images = painter.paint()
    print(f"Full sampling takes about {time.perf_counter() - started:.2f} seconds.")
    painter.save_grid(images, "sample_t2i.png")


if __name__ == "__main__":
    run(lambda: main(parser().parse_args()))
