"""How the GPT is trained on codes: data, optimizers, one step, validation. `train_c2i.py` is its command."""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autoregressive.build import build_gpt, describe_weights, latent_grid
from autoregressive.models.gpt import Transformer
from autoregressive.train.validation import HeldOut, Validator, model_inputs
from dataset.build import build_dataset
from dataset.sampler import training_loader
from utils.args import apply_threads
from utils.distributed import data_parallel, process_group
from utils.ema import requires_grad, update_ema
from utils.flops import training_flops_per_image
from utils.logger import create_logger
from utils.optim import Optimizers, adamw, decay_groups, muon_and_adamw
from utils.precision import allow_tf32, autocast, grad_scaler
from utils.run_folder import RunFolder, open_run
from utils.schedule import lr_factor
from utils.seeding import seed_step
from utils.throughput import StepCost
from utils.trainer import Trainer, TrainSettings

_CHECKED = 256  # files that are read once before the training begins

Batch = tuple[Tensor, Tensor]  # codes (B, 1, N) int64, labels (B, 1) int64


def train(args: argparse.Namespace) -> None:
    """Train a class-conditional GPT as `args` says; see `train_c2i.py --help`."""
    if args.gpt_type != "c2i":
        raise ValueError("this command trains class-conditional models; --gpt-type t2i is not for it")
    apply_threads(args)
    allow_tf32()
    with process_group(args.device) as device:
        codes = code_dataset(args, args.code_path)
        run = open_run(args, args.gpt_model)
        logger = create_logger(run.path)
        make_trainer(args, device, codes, run, logger).fit()
        logger.info("Done!")


def make_trainer(
    args: argparse.Namespace, device: torch.device, codes: Dataset, run: RunFolder, logger: logging.Logger
) -> Trainer:
    """Model, optimizers, data and loop of one run, at the step where it was left."""
    logger.info(f"Experiment directory: {run.path}; settings: {args}")
    seed_step(args.global_seed, 0, 0)  # equal initial weights on all ranks and in all restarts
    model = build_gpt(args, args.vocab_size, **dropout_fields(args)).to(device)
    ema = copy.deepcopy(model).eval() if args.ema else None
    optimizers = make_optimizers(model, args, device)
    scaler = grad_scaler(device, args.mixed_precision)
    sampler, loader = training_loader(codes, args, device)
    settings = TrainSettings.from_args(args, sampler.batches_per_epoch)
    logger.info(f"GPT Parameters: {sum(p.numel() for p in model.parameters()):,}")
    logger.info(
        f"Dataset contains {len(codes):,} images ({args.code_path}), {sampler.batches_per_epoch:,} steps an epoch"
    )
    trainer = Trainer(
        run,
        logger,
        device,
        loader,
        step=TrainStep(args, model, ema, optimizers, scaler, device, settings.total_steps),
        stateful={"model": model, "optimizer": optimizers, "scaler": scaler} | ({"ema": ema} if ema else {}),
        settings=settings,
        extra={"args": vars(args)},
        validate=_validator(args, model, ema, device),
        cost=step_cost(model, args.global_batch_size),
    )
    sampler.start = trainer.resume(args.gpt_ckpt, describe_weights)
    return trainer


def step_cost(model: Transformer, images: int) -> StepCost:
    """What one step over a global batch of `images` costs."""
    return StepCost(images * model.block_size, images * training_flops_per_image(model.config))


def dropout_fields(args: argparse.Namespace) -> dict[str, float]:
    """The `ModelArgs` fields that regularise; stochastic depth replaces residual and FFN dropout."""
    dropout = 0.0 if args.drop_path_rate > 0 else args.dropout_p
    return {
        "resid_dropout_p": dropout,
        "ffn_dropout_p": dropout,
        "drop_path_rate": args.drop_path_rate,
        "token_dropout_p": args.token_dropout_p,
        "class_dropout_prob": args.class_dropout_prob,
    }


def code_dataset(args: argparse.Namespace, code_path: str) -> Dataset:
    """Codes under `code_path` with labels, or for --gpt-type t2i with text features.

    Each item is checked against the vocabulary and the classes when it is read.

    Raises:
        ValueError: when the codes are of another grid than --image-size and --downsample-size say.
    """
    name = "t2i_code" if args.gpt_type == "t2i" else args.dataset
    codes = build_dataset(argparse.Namespace(**{**vars(args), "code_path": code_path, "dataset": name}))
    grid = latent_grid(args)
    if codes.num_tokens != grid**2:
        raise ValueError(
            f"{code_path} holds {codes.num_tokens} codes an image; --image-size {args.image_size} with "
            f"--downsample-size {args.downsample_size} makes {grid} x {grid} = {grid**2}"
        )
    for index in range(0, len(codes), max(len(codes) // _CHECKED, 1)):
        codes[index]  # a wrong vocabulary or class count is found before any training
    return codes


def make_optimizers(model: Transformer, args: argparse.Namespace, device: torch.device) -> Optimizers:
    """AdamW over all weights, or Muon over the matrices of the blocks and AdamW over the rest."""
    betas, named = (args.beta1, args.beta2), list(model.named_parameters())
    if args.optimizer == "adamw":
        return Optimizers(adamw(decay_groups(named, args.weight_decay), args.lr, betas, device))
    hidden = {id(p) for p in model.layers.parameters() if p.dim() >= 2}
    return muon_and_adamw(named, lambda _, p: id(p) in hidden, args.lr, args.weight_decay, betas, device)


class TrainStep:
    """One optimizer step over micro-batches of (codes, labels)."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: Transformer,
        ema: Transformer | None,
        optimizers: Optimizers,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        total_steps: int,
    ) -> None:
        self.args, self.model, self.ema, self.device = args, model, ema, device
        self.optimizers, self.scaler, self.total_steps = optimizers, scaler, total_steps
        if ema is not None:
            requires_grad(ema, False)
        wanted = args.compile if args.compile is not None else device.type == "cuda"
        self.wrapped: nn.Module = data_parallel(torch.compile(model) if wanted else model, device)

    def __call__(self, batches: Sequence[Batch], number: int) -> Mapping[str, Tensor]:
        args = self.args
        factor = lr_factor(number, self.total_steps, args.lr_schedule, args.warmup_steps, args.lr_floor)
        self.optimizers.set_lr_factor(factor)
        self.wrapped.train()
        losses = [self._backward(batch, len(batches), last=i == len(batches) - 1) for i, batch in enumerate(batches)]
        norm = self.optimizers.update(self.scaler, args.max_grad_norm)
        if self.ema is not None:
            update_ema(self.ema, self.model)
        return {"loss": torch.stack(losses).mean(), "grad_norm": norm, "lr": torch.tensor(args.lr * factor)}

    def _backward(self, batch: Batch, parts: int, last: bool) -> Tensor:
        codes, labels = (x.to(self.device, non_blocking=True) for x in batch)
        codes, labels = codes.flatten(1), labels.flatten()
        alone = not hasattr(self.wrapped, "no_sync")
        with contextlib.nullcontext() if last or alone else self.wrapped.no_sync():
            with autocast(self.device, self.args.mixed_precision):
                _, loss = self.wrapped(idx=codes[:, :-1], cond_idx=labels, targets=codes)
            self.scaler.scale(loss / parts).backward()
        return loss.detach()


def _validator(
    args: argparse.Namespace, model: Transformer, ema: Transformer | None, device: torch.device
) -> Validator | None:
    if not args.val_code_path:
        return None
    held_out = HeldOut(code_dataset(args, args.val_code_path), args.val_images)
    inputs = partial(model_inputs, device=device)
    return Validator(held_out, inputs, model, ema, device, args.mixed_precision)
