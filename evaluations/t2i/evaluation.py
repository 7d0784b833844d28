"""CLIP score and FID of pictures that were drawn from captions.

COCO, 30,000 captions against the 40,504 validation images of 2014:
    python3 evaluations/t2i/evaluation.py --fake_dir samples_coco/FOLDER --ref_dir data/coco --eval_res 256
PartiPrompts, which have no real pictures: CLIP score alone
    python3 evaluations/t2i/evaluation.py --fake_dir samples_parti/FOLDER --how_many 1632
Several GPUs: torchrun --nproc_per_node=8 evaluations/t2i/evaluation.py ...

The FID follows clean-fid (mode "clean") after cropping and resizing to --eval_res, the CLIP score is the mean cosine of
pictures and "A photo depicts " + caption. Both are printed and written to score.txt and scores.json in --fake_dir.
Unknown flags are ignored, as they always were, but named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.t2i.scores import evaluate
from utils.args import add_runtime_args, make_parser
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--fake_dir", required=True, help="what sample_t2i_ddp.py wrote: images/ and result.jsonl")
    flags.add_argument("--ref_dir", help="real pictures: the folder that has val2014/; without it there is no FID")
    flags.add_argument("--ref_data", choices=["coco2014", "imagenet2012", "laion4k"], default="coco2014",
                       help="coco2014 takes val2014/ of --ref_dir, the others its sub-folder --ref_type")  # fmt: skip
    flags.add_argument(
        "--ref_type", choices=["train", "valid", "test"], default="train", help="sub-folder of --ref_dir"
    )
    flags.add_argument("--how_many", type=int, default=30000, help="pictures for the CLIP score, at most")
    flags.add_argument("--clip_model4eval", choices=["ViT-B/32", "ViT-G/14", "WO"], default="ViT-B/32",
                       help="CLIP model; WO goes without the CLIP score")  # fmt: skip
    flags.add_argument("--clip-weights", help="local folder of the CLIP model (Hugging Face format), for use offline")
    flags.add_argument("--features", choices=["inception", "lite0"], default="inception",
                       help="feature space of the FID; lite0 needs no download and is never called FID")  # fmt: skip
    flags.add_argument("--weights", help="local file of the Inception weights, classify_image_graph_def.pb")
    flags.add_argument("--eval_res", type=int, default=256, help="pictures are cropped and resized to this edge first")
    flags.add_argument("--batch_size", type=int, default=8, help="pictures at a time, of each process")
    add_runtime_args(flags)
    return flags


def main() -> None:
    """Parse the flags and evaluate."""
    args, unknown = parser().parse_known_args()
    if unknown:
        print(f"ignored unknown flags: {' '.join(unknown)}", file=sys.stderr)
    evaluate(args)


if __name__ == "__main__":
    run(main)
