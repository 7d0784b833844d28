"""How the image tokenizer is trained: data, losses, the two optimizers, one step. `vq_train.py` is its command."""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from dataset.augmentation import eval_transform, train_transform
from dataset.build import build_dataset
from dataset.images import SkipBad
from dataset.sampler import Draw, SeededItems, training_loader
from tokenizer.build import build_tokenizer, describe_weights
from tokenizer.tokenizer_image.codebook import kmeans_init, revive_dead_codes
from tokenizer.tokenizer_image.evaluation import evaluate_reconstruction
from tokenizer.tokenizer_image.vq_loss import VQLoss
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.args import apply_threads
from utils.distributed import average_gradients, broadcast, data_parallel, is_main, process_group
from utils.ema import requires_grad, update_ema
from utils.logger import create_logger
from utils.optim import Optimizers, adamw, muon_and_adamw
from utils.precision import allow_tf32, autocast, grad_scaler
from utils.run_folder import open_run
from utils.schedule import lr_factor
from utils.seeding import mix_seed, seed_step
from utils.trainer import Trainer, TrainSettings

_KMEANS_IMAGES = 384
_REVIVE_UNTIL = 0.8  # share of the training after which the codebook is left alone


def train(args: argparse.Namespace) -> None:
    """Train a tokenizer as `args` says; see `vq_train.py --help`."""
    apply_threads(args)
    allow_tf32()
    with process_group(args.device) as device:
        images = training_images(args)
        seed_step(args.global_seed, 0, 0)  # equal initial weights on all ranks and in all restarts
        model = new_model(args).to(device, memory_format=torch.channels_last)
        if args.image_size % model.stride:
            raise ValueError(
                f"--image-size {args.image_size} is not a multiple of the stride {model.stride} of {args.vq_model}"
            )
        run = open_run(args, args.vq_model)
        logger = create_logger(run.path)
        logger.info(f"Experiment directory: {run.path}; settings: {args}")
        logger.info(f"VQ Model Parameters: {sum(p.numel() for p in model.parameters()):,}")
        sampler, loader = training_loader(images, args, device)
        logger.info(f"Dataset: {args.data_path}, {sampler.batches_per_epoch:,} steps an epoch")
        settings = TrainSettings.from_args(args, sampler.batches_per_epoch)
        step = TrainStep(args, model, images, device, settings.total_steps, logger)
        trainer = Trainer(
            run,
            logger,
            device,
            loader,
            step,
            step.stateful(),
            settings,
            {"args": vars(args)},
            _validator(args, model, device),
        )
        sampler.start = trainer.resume(args.vq_ckpt, describe_weights, restart=args.finetune)
        trainer.fit()
        logger.info("Done!")


def training_images(args: argparse.Namespace) -> Dataset:
    """The images of `args`, randomly cropped; unreadable ones are left out up to --max-bad-share."""
    images = build_dataset(args, transform=train_transform(args.image_size))
    return images if isinstance(images, IterableDataset) else SkipBad(images, args.max_bad_share)


def new_model(args: argparse.Namespace) -> VQModel:
    """An untrained tokenizer with the loss settings of `args`."""
    return build_tokenizer(
        args,
        codebook_l2_norm=args.codebook_l2_norm,
        commit_loss_beta=args.commit_loss_beta,
        entropy_loss_ratio=args.entropy_loss_ratio,
        dropout_p=args.dropout_p,
    )


def new_loss(args: argparse.Namespace) -> VQLoss:
    """Reconstruction, perceptual and adversarial losses as `args` weighs them; a weight of 0 leaves its net out."""
    return VQLoss(
        disc_start=args.disc_start,
        disc_weight=args.disc_weight,
        disc_type=args.disc_type,
        disc_loss=args.disc_loss,
        gen_adv_loss=args.gen_loss,
        disc_adaptive_weight=args.disc_adaptive_weight,
        image_size=args.image_size,
        perceptual_weight=args.perceptual_weight,
        reconstruction_weight=args.reconstruction_weight,
        reconstruction_loss=args.reconstruction_loss,
        gradient_weight=args.gradient_weight,
        codebook_weight=args.codebook_weight,
        vgg_path=args.vgg_path,
    )


def one_group(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All parameters in one group, as in the established trainer, whose optimizer states thus load here."""
    return [{"params": list(model.parameters()), "weight_decay": weight_decay}]


def make_optimizers(model: VQModel, args: argparse.Namespace, device: torch.device) -> Optimizers:
    """Adam over all weights, or Muon over the convolutions between the outermost ones and Adam over the rest."""
    betas, named = (args.beta1, args.beta2), list(model.named_parameters())
    if args.optimizer == "adamw":
        return Optimizers(adamw(one_group(model, args.weight_decay), args.lr, betas, device))
    outermost = ("conv_in.", "conv_out.", "quant_conv.")

    def is_hidden(name: str, p: nn.Parameter) -> bool:
        return p.dim() == 4 and not any(part in name for part in outermost)

    return muon_and_adamw(named, is_hidden, args.lr, args.weight_decay, betas, device)


class TrainStep:
    """One step of the tokenizer, then one of the discriminator on the same reconstructions."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: VQModel,
        images: Dataset,
        device: torch.device,
        total_steps: int,
        logger: logging.Logger | None = None,
    ) -> None:
        self.args, self.model, self.images, self.device, self.total_steps = args, model, images, device, total_steps
        self.loss = new_loss(args).to(device)
        self.log = {"logger": logger if is_main() else None, "log_every": args.log_every}
        self.ema = copy.deepcopy(model).eval() if args.ema else None
        if self.ema is not None:
            requires_grad(self.ema, False)
        self.optimizers, self.scaler = make_optimizers(model, args, device), grad_scaler(device, args.mixed_precision)
        self.discriminator = self.loss.discriminator
        if self.discriminator is not None:
            groups = one_group(self.discriminator, args.weight_decay)
            self.disc_optimizers = Optimizers(adamw(groups, args.lr, (args.beta1, args.beta2), device))
            self.disc_scaler = grad_scaler(device, args.mixed_precision)
        self.wrapped: nn.Module = data_parallel(torch.compile(model) if args.compile else model, device)

    def stateful(self) -> dict[str, object]:
        """What a checkpoint holds, under the established names."""
        parts = {"model": self.model, "optimizer": self.optimizers, "scaler": self.scaler}
        if self.ema is not None:
            parts["ema"] = self.ema
        if self.discriminator is not None:
            parts |= {"discriminator": self.discriminator, "optimizer_disc": self.disc_optimizers}
            parts["scaler_disc"] = self.disc_scaler
        return parts

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]], number: int) -> Mapping[str, Tensor]:
        args = self.args
        layout = {"memory_format": torch.channels_last, "non_blocking": True}
        images = [batch[0].to(self.device, **layout) for batch in batches]
        factor = lr_factor(number, self.total_steps, args.lr_schedule, args.warmup_steps, args.lr_floor)
        self.wrapped.train()
        self._tend_codebook(images[-1], number)
        self.optimizers.set_lr_factor(factor)
        passes = [self._generator_pass(x, number, len(images), last=i == len(images) - 1) for i, x in enumerate(images)]
        terms = {"loss": torch.stack([loss for loss, _ in passes]).mean(), **self.loss.terms}
        self.optimizers.update(self.scaler, args.max_grad_norm)
        if self.ema is not None:
            update_ema(self.ema, self.model)
        if self.discriminator is not None and number >= args.disc_start:
            self.disc_optimizers.set_lr_factor(factor)
            terms |= self._discriminator_step(images, [fakes for _, fakes in passes], number)
        return {**terms, "lr": torch.tensor(args.lr * factor)}

    def _generator_pass(self, images: Tensor, number: int, parts: int, last: bool) -> tuple[Tensor, Tensor]:
        alone = not hasattr(self.wrapped, "no_sync")
        with contextlib.nullcontext() if last or alone else self.wrapped.no_sync():
            with autocast(self.device, self.args.mixed_precision):
                fakes, codebook_loss = self.wrapped(images)
                loss = self.loss(codebook_loss, images, fakes, 0, number, self.model.decoder.last_layer, **self.log)
            self.scaler.scale(loss / parts).backward()
        return loss.detach(), fakes.detach()

    def _discriminator_step(self, images: list[Tensor], fakes: list[Tensor], number: int) -> dict[str, Tensor]:
        for real, fake in zip(images, fakes):
            with autocast(self.device, self.args.mixed_precision):
                loss = self.loss(None, real, fake, 1, number, **self.log)
            self.disc_scaler.scale(loss / len(images)).backward()
        average_gradients(self.disc_optimizers.parameters)
        self.disc_optimizers.update(self.disc_scaler, self.args.max_grad_norm)
        return dict(self.loss.terms)

    @torch.no_grad()
    def _tend_codebook(self, images: Tensor, number: int) -> None:
        """Start the codebook from the data, and give codes that nobody uses a new place, as the flags ask."""
        args, quantizer = self.args, self.model.quantize
        if number == 1 and args.codebook_init == "kmeans":
            kmeans_init(quantizer, self._first_latents())
        elif args.revive_every and number % args.revive_every == 0 and number <= _REVIVE_UNTIL * self.total_steps:
            used = torch.bincount(quantizer.codebook_used.long(), minlength=quantizer.n_e) > 0
            revive_dead_codes(quantizer, used, self._latents(images))
        else:
            return
        broadcast(quantizer.embedding.weight)

    def _latents(self, images: Tensor) -> Tensor:
        """What the quantizer would get: (tokens, width)."""
        z = self.model.quant_conv(self.model.encoder(images))
        return z.permute(0, 2, 3, 1).flatten(0, 2)

    def _first_latents(self) -> Tensor:
        if isinstance(self.images, IterableDataset):
            batches = itertools.islice(DataLoader(self.images, batch_size=64), _KMEANS_IMAGES // 64)
            return torch.cat([self._latents(batch[0].to(self.device)) for batch in batches])
        seed, count = self.args.global_seed, min(_KMEANS_IMAGES, len(self.images))  # type: ignore[arg-type]
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        draws = [Draw(int(i), mix_seed(seed, int(i))) for i in order[:count]]
        loader = DataLoader(SeededItems(self.images), batch_sampler=[draws[i : i + 64] for i in range(0, count, 64)])
        return torch.cat([self._latents(batch[0].to(self.device)) for batch in loader])


def _validator(args: argparse.Namespace, model: VQModel, device: torch.device):
    if not args.val_data_path:
        return None
    layout = "imagenet" if args.dataset == "tars" else args.dataset  # held-out images need no streaming
    held_out = argparse.Namespace(**{**vars(args), "data_path": args.val_data_path, "dataset": layout})
    images = build_dataset(held_out, transform=eval_transform(args.image_size))
    images = Subset(images, range(min(len(images), args.val_images)))
    return lambda: evaluate_reconstruction(model, DataLoader(images, batch_size=32), device)
