"""How the GPT is trained: data, step, validation, loop. The commands are `train_c2i.py`, `train_c2i_fsdp.py` and
`train_t2i.py`."""

from __future__ import annotations

import argparse
import logging

import torch
from torch.utils.data import Dataset

from autoregressive.build import describe_weights
from autoregressive.models.gpt import Transformer
from autoregressive.train.inputs import Inputs, make_inputs
from autoregressive.train.step import TrainStep
from autoregressive.train.validation import HeldOut, Validator
from dataset.sampler import training_loader
from utils import checkpoint
from utils.args import apply_threads
from utils.distributed import process_group
from utils.flops import training_flops_per_image
from utils.guard import LossGuard
from utils.logger import create_logger
from utils.precision import allow_tf32
from utils.run_folder import RunFolder, open_run
from utils.throughput import StepCost
from utils.trainer import Trainer, TrainSettings


def train(args: argparse.Namespace) -> None:
    """Train a GPT as `args` says; see the commands' --help."""
    if args.gpt_ckpt and args.init_from:
        raise ValueError("--gpt-ckpt continues a training, --init-from begins one from its weights: give one of them")
    apply_threads(args)
    if args.mixed_precision != "fp32":
        allow_tf32()
    with process_group(args.device, even_alone=args.data_parallel != "ddp") as device:
        inputs = make_inputs(args, device)
        data = inputs.training_set()
        run = open_run(args, args.gpt_model)
        logger = create_logger(run.path)
        make_trainer(args, device, inputs, data, run, logger).fit()
        logger.info("Done!")


def make_trainer(
    args: argparse.Namespace,
    device: torch.device,
    inputs: Inputs,
    data: Dataset,
    run: RunFolder,
    logger: logging.Logger,
) -> Trainer:
    """Model, optimizers, data and loop of one run, at the step where it was left."""
    logger.info(f"Experiment directory: {run.path}; settings: {args}")
    sampler, loader = training_loader(data, args, device)
    settings = TrainSettings.from_args(args, sampler.batches_per_epoch)
    guard = LossGuard(args.on_bad_loss, args.spike_threshold, run.path / "bad-batches", logger)
    step = TrainStep(args, device, settings.total_steps, inputs, guard)
    logger.info(f"GPT Parameters: {sum(p.numel() for p in step.model.parameters()):,}")
    source = args.code_path or args.data_path
    logger.info(f"Dataset contains {len(data):,} images ({source}), {sampler.batches_per_epoch:,} steps an epoch")
    trainer = Trainer(
        run,
        logger,
        device,
        loader,
        step=step,
        stateful=step.stateful(),
        settings=settings,
        extra={"args": vars(args)},
        validate=_validator(args, step, device),
        cost=step_cost(step.model, args.global_batch_size),
    )
    if args.init_from and run.latest_checkpoint() is None:
        for part in filter(None, (step.model, step.ema)):
            checkpoint.load_weights(part, args.init_from, prefer_ema=args.init_from_ema, suggest=describe_weights)
        logger.info(f"Initial weights from {args.init_from}")
    sampler.start = trainer.resume(args.gpt_ckpt, describe_weights)
    return trainer


def step_cost(model: Transformer, images: int) -> StepCost:
    """What one step over a global batch of `images` costs."""
    return StepCost(images * model.block_size, images * training_flops_per_image(model.config))


def _validator(args: argparse.Namespace, step: TrainStep, device: torch.device) -> Validator | None:
    if not args.val_code_path:
        return None
    held_out = HeldOut(step.inputs.codes(args.val_code_path), args.val_images)
    return Validator(held_out, step.inputs, step.model, step.ema, device, args.mixed_precision)
