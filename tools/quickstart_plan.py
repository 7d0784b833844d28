"""Measure this machine for a few seconds and plan how many steps of training fit into the minutes given.

    python3 tools/quickstart_plan.py --minutes 10 --plan plan.json --vq-flags "..." --gpt-flags "..."

The plan is kept: a second run uses the numbers of the first, so that interrupted training continues unchanged.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.utils.data import TensorDataset

from autoregressive.build import latent_grid
from autoregressive.train import train_c2i, train_t2i
from autoregressive.train.step import TrainStep
from tokenizer.tokenizer_image import recipe as vq_recipe
from tokenizer.tokenizer_image import train_step as vq_step
from tokenizer.tokenizer_image import vq_train
from utils.args import make_parser
from utils.distributed import process_group
from utils.errors import run
from utils.files import read_json, write_json

_OVERHEAD = 0.15  # share of the time for everything that is not training
_VQ_SHARE = 0.45  # of the training time
_FEWEST_STEPS = 20
_MOST_STEPS = 20_000
_STEPS_OF_A_LARGER_GPT = 2_000  # below that a smaller one learns more in the same time (docs/quickstart.md)


def plan(minutes: float, vq_flags: list[str], gpt_flags: list[str], gpt_models: list[str]) -> dict[str, object]:
    """Steps of both trainings that together take about `minutes` on this machine, and the speeds they rest on.

    Of `gpt_models`, from small to large, the largest that gets enough steps is chosen.
    """
    seconds, command = 60 * minutes * (1 - _OVERHEAD), train_t2i if "--cls-token-num" in gpt_flags else train_c2i
    with process_group() as device:
        vq_seconds = seconds_per_step(_vq_step(vq_train.parser().parse_args(vq_flags), device), device)
        for name in reversed(gpt_models):
            args = command.parser().parse_args([*gpt_flags, "--gpt-model", name])
            gpt_seconds = seconds_per_step(_gpt_step(args, device), device)
            gpt_steps = int(seconds * (1 - _VQ_SHARE) / gpt_seconds)
            if gpt_steps >= _STEPS_OF_A_LARGER_GPT:
                break
    wanted = {"vq_steps": int(seconds * _VQ_SHARE / vq_seconds), "gpt_steps": gpt_steps}
    steps = {key: min(max(value, _FEWEST_STEPS), _MOST_STEPS) for key, value in wanted.items()}
    return {
        "gpt_model": name,
        "minutes": minutes, "device": device.type, "cores": os.cpu_count(), "torch": torch.__version__,
        "vq_seconds_per_step": vq_seconds, "gpt_seconds_per_step": gpt_seconds, **steps,
    }  # fmt: skip


def seconds_per_step(step: Callable[[], object], device: torch.device, trials: int = 12) -> float:
    """Median time of one step after a warm-up, in seconds."""
    times = []
    for _ in range(trials):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[trials // 3 :])[(trials - trials // 3) // 2]


def _vq_step(args: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    images = TensorDataset(torch.rand(args.global_batch_size, 3, args.image_size, args.image_size) * 2 - 1)
    model = vq_recipe.new_model(args).to(device, memory_format=torch.channels_last)
    step = vq_step.TrainStep(args, model, images, device, total_steps=1000)
    return lambda: step([images.tensors], number=999)


def _gpt_step(args: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    codes = torch.randint(args.vocab_size, (args.global_batch_size, 1, latent_grid(args) ** 2))
    batch = [codes, torch.randint(args.num_classes, (args.global_batch_size, 1))]
    if args.gpt_type == "t2i":
        features = torch.randn(args.global_batch_size, 1, args.cls_token_num, args.caption_dim)
        text = torch.ones(args.global_batch_size, args.cls_token_num, dtype=torch.bool)
        batch = [codes, features, text, torch.ones(args.global_batch_size, dtype=torch.int64)]
    step = TrainStep(args, device, total_steps=1000)
    return lambda: step([batch], number=500)


def main() -> None:
    """Write the plan unless it is there."""
    flags = make_parser(__doc__)
    flags.add_argument("--minutes", type=float, required=True, help="time for the whole quick start")
    flags.add_argument("--plan", required=True, help="JSON file to write")
    flags.add_argument("--vq-flags", type=shlex.split, required=True, help="flags of vq_train.py")
    what = "flags of train_c2i.py, or with --cls-token-num of train_t2i.py"
    flags.add_argument("--gpt-flags", type=shlex.split, required=True, help=what)
    flags.add_argument("--gpt-models", nargs="+", required=True, help="sizes to choose from, from small to large")
    args = flags.parse_args()
    if args.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, found {args.minutes}")
    if Path(args.plan).is_file():
        kept = read_json(args.plan)
        if kept["minutes"] != args.minutes:
            raise ValueError(
                f"{args.plan} was made for --minutes {kept['minutes']:g}; continue with that, or start anew with "
                f"another --out folder"
            )
    else:
        write_json(args.plan, plan(args.minutes, args.vq_flags, args.gpt_flags, args.gpt_models))
    kept = read_json(args.plan)
    print(
        f"{kept['vq_steps']} steps for the tokenizer, {kept['gpt_steps']} for a {kept['gpt_model']} on {kept['device']}"
    )


if __name__ == "__main__":
    run(main)
