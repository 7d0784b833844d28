"""How likely a GPT finds codes that it was not trained on: bits per token, bits per image, and by position.

    python3 evaluations/nll.py --gpt-ckpt GPT.pt --gpt-model GPT-L --image-size 256 --code-path CODES_OF_VAL_IMAGES
    python3 evaluations/nll.py --gpt-type t2i ... --code-path CODES --t5-feat-path FEATURES
    torchrun --nproc_per_node=8 evaluations/nll.py ...

Writes a JSON file and a picture of the same name beside it. Likelihoods compare models of one tokenizer only: a better
tokenizer puts more into its codes, which makes them harder to foresee.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from autoregressive.build import add_gpt_args, latent_grid, load_gpt
from autoregressive.train.inputs import make_inputs
from autoregressive.train.validation import BATCH_SIZE, HeldOut, Likelihood, likelihood
from utils import checkpoint
from utils.args import add_runtime_args, apply_threads, make_parser
from utils.distributed import is_main, process_group
from utils.errors import run
from utils.files import atomic_path, write_json
from utils.precision import DTYPES, allow_tf32


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the model of `args` and write what was found; returns it, the same on all processes."""
    if args.gpt_type == "t2i":
        args.dataset = "t2i_code"
    if args.use_ema and "ema" not in checkpoint.read(args.gpt_ckpt):
        raise ValueError(f"{args.gpt_ckpt} holds no averaged weights; leave out --use-ema")
    apply_threads(args)
    allow_tf32()
    with process_group(args.device) as device:
        inputs = make_inputs(args, device)
        model = load_gpt(args, args.vocab_size, device)
        held_out = HeldOut(inputs.codes(args.code_path), args.images)
        found = likelihood(model, held_out, inputs, device, args.precision, args.batch_size, what="likelihood")
        report = report_of(args, found)
        if is_main():
            write_json(args.output, report)
            draw_curve(found, latent_grid(args), Path(args.output).with_suffix(".png"))
            print(describe(report))
        return report


def report_of(args: argparse.Namespace, found: Likelihood) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "gpt_ckpt": args.gpt_ckpt,
        "weights": "ema" if args.use_ema else "model",
        "code_path": args.code_path,
        "images": found.images,
        "tokens_per_image": len(found.nats),
        "nats_per_token": found.loss,
        "bits_per_token": found.bits_per_token,
        "bits_per_image": found.bits_per_image,
        "precision": args.precision,
        "bits_by_position": found.bits_by_position,
    }


def describe(report: dict[str, Any]) -> str:
    """The result in one line, as JSON, without the curve."""
    return json.dumps({name: value for name, value in report.items() if name != "bits_by_position"})


def draw_curve(found: Likelihood, grid: int, path: Path) -> None:
    """Draw bits by position in the sequence and on the grid (row by row from the top left)."""
    from matplotlib.figure import Figure

    bits = found.bits_by_position
    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, cells = figure.subplots(1, 2, width_ratios=[2, 1])
    curve.plot(bits, linewidth=1)
    curve.axhline(found.bits_per_token, color="#888", linestyle="--", label=f"mean {found.bits_per_token:.3f}")
    curve.set(title="bits per token by position", xlabel="position of the code", ylabel="bits")
    curve.legend(frameon=False)
    shown = cells.imshow([bits[row * grid : (row + 1) * grid] for row in range(grid)])
    cells.set(title="the same on the image", xticks=[], yticks=[])
    figure.colorbar(shown, ax=cells)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    data = flags.add_argument_group("data")
    data.add_argument("--code-path", required=True, help="codes of held-out images, packed or in files")
    data.add_argument("--dataset", default="imagenet_code", help="how the codes of --gpt-type c2i are stored")
    data.add_argument("--t5-feat-path", help="their text features, for --gpt-type t2i")
    data.add_argument("--images", type=int, help="measure so many images, spread evenly; default: all")
    data.add_argument("--vocab-size", type=int, default=16384, help="codes in the tokenizer's codebook")
    add_gpt_args(flags)
    flags.add_argument("--use-ema", action="store_true", help="measure the averaged weights of the checkpoint")
    flags.add_argument("--from-fsdp", action="store_true", help="accepted: the format of a checkpoint is found out")
    flags.add_argument("--precision", choices=list(DTYPES), default="none", help="autocast format")
    flags.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="images of each process at a time")
    flags.add_argument("--output", default="nll.json", help="JSON file to write; the picture gets its name")
    add_runtime_args(flags)
    return flags


if __name__ == "__main__":
    run(lambda: evaluate(parser().parse_args()))
