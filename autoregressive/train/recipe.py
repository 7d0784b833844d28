"""How the GPT is trained: data, step, validation, loop. The commands are `train_c2i.py`, `train_c2i_fsdp.py` and
`train_t2i.py`."""

from __future__ import annotations

import argparse
import logging

import torch
from torch.utils.data import Dataset

from autoregressive.build import describe_weights
from autoregressive.models.gpt import Transformer
from autoregressive.train.extraction import load_fitting_tokenizer
from autoregressive.train.inputs import Inputs, make_inputs
from autoregressive.train.pictures import SamplePictures, decoded_batch, some_captions, spread_labels
from autoregressive.train.sample_monitor import SampleMonitor, equal_shares, together
from autoregressive.train.sanity import check_codes
from autoregressive.train.step import TrainStep
from autoregressive.train.validation import HeldOut, Validator
from dataset.sampler import training_loader
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import checkpoint
from utils.args import apply_threads
from utils.distributed import is_main, process_group
from utils.flops import training_flops_per_image
from utils.guard import LossGuard
from utils.image import make_grid_image, save_png
from utils.logger import create_logger
from utils.precision import allow_tf32
from utils.run_folder import RunFolder, open_run
from utils.throughput import StepCost
from utils.trainer import Trainer, TrainSettings


def train(args: argparse.Namespace) -> None:
    """Train a GPT as `args` says; see the commands' --help."""
    if args.gpt_ckpt and args.init_from:
        raise ValueError("--gpt-ckpt continues a training, --init-from begins one from its weights: give one of them")
    if args.cls_token_num is None:
        args.cls_token_num = 120 if args.gpt_type == "t2i" else 1
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
        cost=step_cost(step.model, args.global_batch_size),
        settle=step.settle,
    )
    held_out = inputs.codes(args.val_code_path) if args.val_code_path else None
    if held_out is not None:
        share = HeldOut(held_out, args.val_images)
        trainer.validate = Validator(share, inputs, step.model, step.ema, device, args.mixed_precision)
    look_at_data(args, inputs, data, held_out, trainer)
    if args.init_from and run.latest_checkpoint() is None:
        for part in filter(None, (step.model, step.ema)):
            checkpoint.load_weights(part, args.init_from, prefer_ema=args.init_from_ema, suggest=describe_weights)
        logger.info(f"Initial weights from {args.init_from}")
    sampler.start = trainer.resume(args.gpt_ckpt, describe_weights)
    return trainer


def step_cost(model: Transformer, images: int) -> StepCost:
    """What one step over a global batch of `images` costs."""
    return StepCost(images * model.block_size, images * training_flops_per_image(model.config))


def look_at_data(
    args: argparse.Namespace, inputs: Inputs, data: Dataset, held_out: Dataset | None, trainer: Trainer
) -> None:
    """Check the codes, and with --vq-ckpt show them in pictures/data.png and let the trainer draw."""
    if is_main():
        check_codes(args, data, held_out, trainer.logger)
    if not args.vq_ckpt:
        if args.eval_samples:
            raise ValueError("--eval-samples needs --vq-ckpt, the tokenizer that makes pictures of the codes")
        return
    tokenizer = load_fitting_tokenizer(args, inputs.device)
    if tokenizer.config.codebook_size != args.vocab_size:
        raise ValueError(
            f"the tokenizer {args.vq_ckpt} has {tokenizer.config.codebook_size} codes, --vocab-size is "
            f"{args.vocab_size}; give the tokenizer that the codes were made with"
        )
    if is_main():
        shown = decoded_batch(inputs, data, tokenizer)
        save_png(make_grid_image(shown, 8), trainer.run.path / "pictures" / "data.png")
    if args.sample_images:
        trainer.pictures = _pictures(args, inputs, held_out or data, tokenizer, trainer.step, args.sample_images)
    if args.eval_samples:
        count = equal_shares(args.eval_samples)
        drawing = _pictures(args, inputs, held_out or data, tokenizer, trainer.step, count)
        monitor = SampleMonitor(args, drawing, trainer.step, inputs.device)
        trainer.validate = together(trainer.validate, monitor)


def _pictures(
    args: argparse.Namespace, inputs: Inputs, samples: Dataset, tokenizer: VQModel, step: TrainStep, count: int
) -> SamplePictures:
    if args.gpt_type == "c2i":
        conditions, text = spread_labels(args.num_classes, count, inputs.device), None
    else:
        conditions, text = some_captions(inputs, samples, count)
    return SamplePictures(
        {"samples": step.model} | ({"samples-ema": step.ema} if step.ema is not None else {}),
        tokenizer,
        conditions,
        text,
        precision=args.mixed_precision,
        seed=args.global_seed,
        cfg_scale=args.sample_cfg_scale if args.class_dropout_prob > 0 else 1.0,
        everywhere=args.data_parallel != "ddp",
    )
