"""One step of tokenizer training: the tokenizer's losses and update, then the discriminator's, then the codebook's.

`recipe.py` puts it to work; `vq_train.py` is the command.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dataset.sampler import Draw, SeededItems
from tokenizer.tokenizer_image.codebook import kmeans_init, revive_dead_codes
from tokenizer.tokenizer_image.vq_loss import VQLoss
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.distributed import (
    average_gradients,
    barrier,
    broadcast,
    data_parallel,
    gather_rows,
    is_main,
    read_launch,
    sum_over_ranks,
)
from utils.ema import requires_grad, update_ema
from utils.optim import Optimizers, adamw, muon_and_adamw
from utils.precision import autocast, grad_scaler
from utils.schedule import lr_factor
from utils.seeding import mix_seed

_KMEANS_IMAGES = 384
_REVIVE_UNTIL = 0.8  # share of the training after which the codebook is left alone


def new_loss(args: argparse.Namespace) -> VQLoss:
    """Reconstruction, perceptual and adversarial losses as `args` weighs them; a weight of 0 leaves its net out."""
    return VQLoss(
        disc_start=args.disc_start,
        disc_weight=args.disc_weight,
        disc_type=args.disc_type,
        disc_num_layers=args.disc_layers,
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


def new_loss_once_downloaded(args: argparse.Namespace) -> VQLoss:
    """`new_loss`, on one process of each machine first: it downloads what the perceptual loss needs for the others."""
    first = read_launch().local_rank == 0
    if not first:
        barrier()
    loss = new_loss(args)
    if first:
        barrier()
    return loss


def one_group(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All trained parameters in one group, as in the established trainer, whose optimizer states thus load here."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]


def make_optimizers(model: VQModel, args: argparse.Namespace, device: torch.device) -> Optimizers:
    """Adam over all weights, or Muon over the convolutions between the outermost ones and Adam over the rest."""
    betas = (args.beta1, args.beta2)
    if args.optimizer == "adamw":
        return Optimizers(adamw(one_group(model, args.weight_decay), args.lr, betas, device))
    outermost = ("conv_in.", "conv_out.", "quant_conv.")

    def is_hidden(name: str, p: nn.Parameter) -> bool:
        return p.dim() == 4 and not any(part in name for part in outermost)

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return muon_and_adamw(trained, is_hidden, args.lr, args.weight_decay, betas, device)


def recompute_activations(model: VQModel) -> None:
    """Let the levels of encoder and decoder compute their activations again in the backward pass: memory for time."""
    for half in (model.encoder, model.decoder):
        for block in (*half.conv_blocks, *half.mid):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def ema_decay(step: int, limit: float) -> float:
    """How much of the average is kept at `step` (1-based): little at first, so that the start is soon forgotten."""
    return min(limit, (1 + step) / (10 + step))


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
        if not 0 <= args.ema_decay < 1:
            raise ValueError(f"--ema-decay must lie in [0, 1), but is {args.ema_decay}")
        self.args, self.model, self.device, self.total_steps = args, model, device, total_steps
        self.loss = new_loss_once_downloaded(args).to(device)
        self.log = {"logger": logger if is_main() else None, "log_every": args.log_every}
        self.ema = copy.deepcopy(model).eval() if args.ema else None
        if self.ema is not None:
            requires_grad(self.ema, False)
        self.codebook = CodebookCare(args, model, images, device, total_steps)
        self.optimizers, self.scaler = make_optimizers(model, args, device), grad_scaler(device, args.mixed_precision)
        self.discriminator = self.loss.discriminator
        if self.discriminator is not None:
            groups, lr = one_group(self.discriminator, args.weight_decay), args.disc_lr or args.lr
            self.disc_optimizers = Optimizers(adamw(groups, lr, (args.beta1, args.beta2), device))
            self.disc_scaler = grad_scaler(device, args.mixed_precision)
        if args.gradient_checkpointing:
            recompute_activations(model)
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
        self.codebook.before_step(images[-1], number)
        self.optimizers.set_lr_factor(factor)
        passes = [self._generator_pass(x, number, len(images), last=i == len(images) - 1) for i, x in enumerate(images)]
        terms = {"loss": torch.stack([loss for loss, _ in passes]).mean(), **self.loss.terms}
        if not self._is_logged(number):
            del terms["codebook_usage"]  # one process's own; of all together it is known at log steps alone
        self.optimizers.update(self.scaler, args.max_grad_norm)
        self.model.quantize.update(sum_over_ranks)
        self._update_ema(number)
        if self.discriminator is not None and number >= args.disc_start:
            self.disc_optimizers.set_lr_factor(factor)
            loss, more = self._discriminator_step(images, [fakes for _, fakes in passes], number)
            terms |= {**more, "loss": terms["loss"] + loss}  # both sides, as the established log has it
        return {**terms, "lr": torch.tensor(args.lr * factor)}

    def _is_logged(self, number: int) -> bool:
        return self.args.log_every > 0 and number % self.args.log_every == 0

    def _generator_pass(self, images: Tensor, number: int, parts: int, last: bool) -> tuple[Tensor, Tensor]:
        alone = not hasattr(self.wrapped, "no_sync")
        with contextlib.nullcontext() if last or alone else self.wrapped.no_sync():
            with autocast(self.device, self.args.mixed_precision):
                fakes, codebook_loss = self.wrapped(images)
                if last and self._is_logged(number):
                    codebook_loss = (*codebook_loss[:3], self.codebook.usage())
                loss = self.loss(codebook_loss, images, fakes, 0, number, self.model.decoder.last_layer, **self.log)
            self.scaler.scale(loss / parts).backward()
        return loss.detach(), fakes.detach()

    def _discriminator_step(
        self, images: list[Tensor], fakes: list[Tensor], number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses = []
        for real, fake in zip(images, fakes):
            with autocast(self.device, self.args.mixed_precision):
                loss = self.loss(None, real, fake, 1, number, **self.log)
            self.disc_scaler.scale(loss / len(images)).backward()
            losses.append(loss.detach())
        average_gradients(self.disc_optimizers.parameters)
        self.disc_optimizers.update(self.disc_scaler, self.args.max_grad_norm)
        return torch.stack(losses).mean(), dict(self.loss.terms)

    @torch.no_grad()
    def _update_ema(self, number: int) -> None:
        if self.ema is None:
            return
        update_ema(self.ema, self.model, ema_decay(number, self.args.ema_decay))
        for own, new in zip(self.ema.buffers(), self.model.buffers()):
            own.copy_(new)


class CodebookCare:
    """What the codebook gets besides gradients: a start from the data, revival, and the measure of its use.

    All processes see the same latents and draw the same numbers, so the codebook becomes what one process would make
    of the whole batch.
    """

    def __init__(
        self, args: argparse.Namespace, model: VQModel, images: Dataset, device: torch.device, total_steps: int
    ) -> None:
        self.args, self.model, self.images, self.device, self.total_steps = args, model, images, device, total_steps
        default = 20 if args.quantizer == "ema" else 0
        self.revive_every = default if args.revive_every is None else args.revive_every

    def usage(self) -> Tensor:
        """Share of the codes that are in the usage window of any process, 0-d."""
        return (sum_over_ranks(self.model.quantize.seen()) > 0).float().mean()

    @torch.no_grad()
    def before_step(self, images: Tensor, number: int) -> None:
        """Start the codebook from the data, and give codes that nobody uses a new place, as the flags ask."""
        quantizer = self.model.quantize
        generator = torch.Generator().manual_seed(mix_seed(self.args.global_seed, number))
        if number == 1 and self.args.codebook_init == "kmeans":
            kmeans_init(quantizer, self._first_latents(), generator=generator)
        elif self._revives(number):
            used = sum_over_ranks(quantizer.in_use()) > 0
            revive_dead_codes(quantizer, used, gather_rows(self._latents(images)), generator)
        else:
            return
        for name, tensor in quantizer.state_dict().items():
            if name != "codebook_used":
                broadcast(tensor)  # equal already, but for rounding on unequal machines

    def _revives(self, number: int) -> bool:
        return self.revive_every > 0 and number % self.revive_every == 0 and number <= _REVIVE_UNTIL * self.total_steps

    def _latents(self, images: Tensor) -> Tensor:
        """What the quantizer would get: (tokens, width)."""
        z = self.model.quant_conv(self.model.encoder(images))
        return z.permute(0, 2, 3, 1).flatten(0, 2)

    def _first_latents(self) -> Tensor:
        return torch.cat([self._latents(batch[0].to(self.device)) for batch in self._first_batches()])

    def _first_batches(self) -> Iterable[Any]:
        if isinstance(self.images, IterableDataset):
            return itertools.islice(DataLoader(self.images, batch_size=64), _KMEANS_IMAGES // 64)
        seed, count = self.args.global_seed, min(_KMEANS_IMAGES, len(self.images))  # type: ignore[arg-type]
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        draws = [Draw(int(i), mix_seed(seed, int(i))) for i in order[:count]]
        return DataLoader(SeededItems(self.images), batch_sampler=[draws[i : i + 64] for i in range(0, count, 64)])
