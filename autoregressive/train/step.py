"""One optimizer step of the GPT, and everything whose state it changes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoregressive.build import build_gpt
from autoregressive.models.gpt import Transformer
from autoregressive.train.inputs import Inputs, make_inputs
from autoregressive.train.parallel import gradient_sync, parallelize
from utils.distributed import mean_over_ranks
from utils.ema import update_ema
from utils.guard import DeviceGuard, LossGuard
from utils.optim import Optimizers, adamw, decay_groups, muon_and_adamw
from utils.precision import autocast, grad_scaler
from utils.schedule import lr_factor
from utils.seeding import seed_step
from utils.trainer import REFUSED


class TrainStep:
    """One optimizer step over micro-batches.

    `guard`, if given, may refuse a step: its losses are then not reported and nothing changes. Where
    `decides_on_device`, the host does not wait for the losses: a step reports whether it was refused under `REFUSED`,
    and the guard hears of it with the next step, or at `settle`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        total_steps: int,
        inputs: Inputs | None = None,
        guard: LossGuard | None = None,
    ) -> None:
        self.args, self.device, self.total_steps, self.guard = args, device, total_steps, guard
        self.inputs = inputs or make_inputs(args, device)
        seed_step(args.global_seed, 0, 0)  # equal initial weights on all ranks and in all restarts
        make = partial(build_gpt, args, args.vocab_size, **dropout_fields(args))
        self.model, self.wrapped, self.ema = parallelize(make, args, device)
        self.optimizers = make_optimizers(self.model, args, device)
        self.scaler = grad_scaler(device, args.mixed_precision)
        self.on_device = decides_on_device(device, self.optimizers, self.scaler)
        self.device_guard = DeviceGuard(guard) if guard is not None and self.on_device else None

    def stateful(self) -> dict[str, Any]:
        """What a checkpoint holds, under the established names."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizers}
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler
        if self.ema is not None:
            parts["ema"] = self.ema
        if self.guard is not None and self.guard.threshold:
            parts["guard"] = self.guard
        return parts

    def __call__(self, batches: Sequence[Sequence[Tensor]], number: int) -> Mapping[str, Tensor]:
        args = self.args
        factor = lr_factor(number, self.total_steps, args.lr_schedule, args.warmup_steps, args.lr_floor)
        self.optimizers.set_lr_factor(factor)
        self.wrapped.train()
        shares, last = self.inputs.shares(batches), len(batches) - 1
        losses = [self._backward(batch, shares[i], last=i == last) for i, batch in enumerate(batches)]
        update = self._update_on_device if self.on_device else self._update
        values = update(torch.stack(losses).sum(), number, batches)
        return {**values, "lr": torch.tensor(args.lr * factor)} if values else {}

    def settle(self) -> None:
        """Wait for the verdict on the last step.

        Raises:
            ValueError: when that step ends the training.
        """
        if self.device_guard is not None:
            self.device_guard.settle()

    def _update(self, loss: Tensor, number: int, batches: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        norm = self.optimizers.clip(self.scaler, self.args.max_grad_norm)
        if self.guard is not None and not self._admitted(loss, norm, number, batches):
            self.optimizers.discard(self.scaler)
            return {}
        self.optimizers.apply(self.scaler)
        if self.scaler.is_enabled():  # a gradient that overflows is the scaler's business, no reason to stop
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        if self.ema is not None:
            update_ema(self.ema, self.model, self.args.ema_decay)
        return {"loss": loss, "grad_norm": norm}

    def _update_on_device(self, loss: Tensor, number: int, batches: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        norm, refused = self.optimizers.norm(), None
        if self.device_guard is not None:
            everywhere = mean_over_ranks(torch.stack([loss, norm.to(loss.dtype)]))
            refused = self.device_guard.refused(everywhere[0], everywhere[1], number, batches)
        self.optimizers.step_scaled(norm, self.args.max_grad_norm, refused)
        if self.ema is not None:
            update_ema(self.ema, self.model, self.args.ema_decay, refused)
        return {"loss": loss, "grad_norm": norm} | ({} if refused is None else {REFUSED: refused})

    def _backward(self, batch: Sequence[Tensor], share: float, last: bool) -> Tensor:
        arguments = self.inputs(batch)
        with gradient_sync(self.wrapped, last):
            with autocast(self.device, self.args.mixed_precision):
                _, loss = self.wrapped(**arguments, loss_only=True)
            self.scaler.scale(loss * share).backward()
        return loss.detach() * share

    def _admitted(self, loss: Tensor, norm: Tensor, number: int, batches: Sequence[Sequence[Tensor]]) -> bool:
        found, found_norm = mean_over_ranks(torch.stack([loss, norm.to(loss.dtype)])).tolist()
        if self.scaler.is_enabled():
            found_norm = 0.0  # with fp16 it overflows now and then; the scaler looks after that
        return self.guard.admits(found, found_norm, number, batches)  # type: ignore[union-attr]


def decides_on_device(device: torch.device, optimizers: Optimizers, scaler: torch.amp.GradScaler) -> bool:
    """Whether a step is clipped, and refused if need be, on the device: on GPUs, whose work would else be waited for.

    Only fused AdamW can leave a step out by itself, and with fp16 the loss scaler wants to know on the host.
    """
    return device.type == "cuda" and optimizers.fused and not scaler.is_enabled()


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


def make_optimizers(model: Transformer, args: argparse.Namespace, device: torch.device) -> Optimizers:
    """AdamW over all weights, or Muon over the matrices of the blocks and AdamW over the rest."""
    betas, named = (args.beta1, args.beta2), list(model.named_parameters())
    if args.optimizer == "adamw":
        return Optimizers(adamw(decay_groups(named, args.weight_decay), args.lr, betas, device))
    hidden = {id(p) for p in model.layers.parameters() if p.dim() >= 2}
    return muon_and_adamw(named, lambda _, p: id(p) in hidden, args.lr, args.weight_decay, betas, device)
