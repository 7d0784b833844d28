"""Draw a picture of every prompt of a list, on any number of processes, for evaluation.

    torchrun --nproc_per_node=8 autoregressive/sample/sample_t2i_ddp.py --prompt-csv PartiPrompts.tsv \
        --gpt-model GPT-XL --gpt-ckpt t2i_XL_stage1_256.pt --vq-ckpt vq_ds16_t2i.pt --image-size 256

Writes {folder}/images/{number}.png for exactly the prompts of the list, result.jsonl (prompt, picture and seed of each)
and captions.txt. Picture i depends on the checkpoints, the settings, --global-seed, its prompt and i alone. Started
again, the command keeps what is finished and draws the rest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.sample.pipeline import add_model_args
from autoregressive.sample.prompt_set import sample_prompt_set
from autoregressive.sample.text import add_text_args
from utils.args import add_seed_arg, make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    what = flags.add_argument_group("pictures")
    what.add_argument(
        "--prompt-csv",
        default="evaluations/t2i/PartiPrompts.tsv",
        help="prompts: a table with a column Prompt (tab-separated, .csv, .jsonl, .parquet), or .txt with one a line",
    )
    what.add_argument("--num-fid-samples", type=int, default=30000, help="pictures in all, at most one for each prompt")
    what.add_argument(
        "--per-proc-batch-size", type=int, default=32, help="at once, per process; halved if memory is short"
    )
    what.add_argument("--sample-dir", default="samples_parti", help="the folder of the pictures is made in here")
    add_text_args(flags)
    add_model_args(flags, cfg_scale=7.5, top_k=1000, gpt_type="t2i", image_size=512)
    add_seed_arg(flags)
    return flags


if __name__ == "__main__":
    run(lambda: sample_prompt_set(parser().parse_args(), vars(parser().parse_args([]))))
