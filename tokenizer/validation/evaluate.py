"""Measure a tokenizer: rFID, PSNR, SSIM, LPIPS and the use of its codebook, in one command.

    python3 tokenizer/validation/evaluate.py --data-path imagenet/val --vq-ckpt vq_ds16_c2i.pt --image-size 256
    torchrun --nproc_per_node=8 tokenizer/validation/evaluate.py --data-path imagenet/val --vq-ckpt vq_ds16_c2i.pt

Reconstructs every image as reconstruction_vq_ddp.py does (same folder, same pictures; what is there is kept), compares
them with the centre-cropped originals, and writes FOLDER_evaluation.json. Without the Inception weights lite0 features
take their place: KD-lite0 and FD-lite0, which are no rFID. LPIPS is measured where VGG16's weights are on this machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.networks import add_feature_args
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.validation.measures import evaluate
from utils.errors import run


def parser() -> argparse.ArgumentParser:
    """All flags of this command: those of reconstruction_vq_ddp.py, and what to measure."""
    flags = reconstruction_vq_ddp.parser()
    flags.description = __doc__
    add_feature_args(flags)
    flags.add_argument("--vgg-path", help="torchvision's VGG16 weights, for LPIPS; the default is torch's hub cache")
    flags.add_argument("--table", help="add the result as a row to this .csv, and to the .md beside it")
    return flags


if __name__ == "__main__":
    run(lambda: evaluate(parser().parse_args(), reconstruction_vq_ddp.load))
