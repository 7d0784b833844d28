"""Optimizers: AdamW with the established parameter groups, and Muon for hidden weights.

Muon: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; scaled to AdamW's step size as in
Liu et al. 2025, "Muon is scalable for LLM training" (arXiv:2502.16982). torch.optim.Muon takes matrices alone; the
tokenizer's weights are convolutions, hence this one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from utils.sharded import like_sharded, local, whole

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_GATHERED = 8  # sharded matrices that are whole at the same time


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the order given: tensors of two or more dimensions with decay, the others without."""
    trained = [p for _, p in named if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.AdamW:
    """AdamW, fused where the parameters are on a GPU or CPU that torch has a fused kernel for."""
    return torch.optim.AdamW(list(groups), lr=lr, betas=betas, fused=device.type in ("cuda", "cpu"))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest semi-orthogonal matrix, for weights of two or more dimensions.

    A convolution kernel (O, I, h, w) counts as the matrix (O, I*h*w). The update is scaled by 0.2 * sqrt(max(rows,
    columns)), which gives it the size of an AdamW update, so both can share a learning rate.

    Of sharded weights the momentum stays sharded. What is to be orthogonalised is gathered, a few matrices at a time;
    every process computes the same updates, and applies its shard of them.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 2e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if any(p.dim() < 2 for p in group["params"]):
                raise ValueError("Muon takes weights of two or more dimensions; give the others to AdamW")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step. Matrices of one shape are orthogonalised together. With sharded weights all processes call this."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[0], p.numel() // p.shape[0]].append(p)
            for weights in by_shape.values():
                size = _GATHERED if isinstance(weights[0], DTensor) else len(weights)
                for first in range(0, len(weights), size):
                    self._update(weights[first : first + size], group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Update weights of one shape."""
        momenta = [self._nesterov(p, group["momentum"]).to(_working_dtype(p)) for p in weights]
        updates = orthogonalize(torch.stack([whole(momentum).flatten(1) for momentum in momenta]))
        scale = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
        for p, update in zip(weights, updates):
            own = local(like_sharded(update.view(p.shape), p))
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(own, alpha=-scale)

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        """What the update is made of, like the gradient and sharded as it is."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices; (B, rows, columns), any float dtype.

    Singular values end near 1 (between about 0.7 and 1.2). Works in bf16 on GPUs and float32 on CPUs.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(_working_dtype(matrices))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def _working_dtype(matrices: Tensor) -> torch.dtype:
    return torch.bfloat16 if matrices.is_cuda else torch.float32


class Optimizers:
    """Several optimizers over one model behind the interface of one; with a single one its state dict is that one's."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members
        self._base_lrs = [[group["lr"] for group in member.param_groups] for member in members]

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters under optimization, in order."""
        return [p for member in self.members for group in member.param_groups for p in group["params"]]

    @property
    def fused(self) -> bool:
        """Whether all members are fused AdamW, whose kernels can scale gradients and leave a step out."""
        return all(
            isinstance(member, torch.optim.AdamW) and all(group["fused"] for group in member.param_groups)
            for member in self.members
        )

    def set_lr_factor(self, factor: float) -> None:
        """Set every learning rate to `factor` times the one it was made with, whatever a loaded state said."""
        for member, lrs in zip(self.members, self._base_lrs):
            for group, lr in zip(member.param_groups, lrs):
                group["lr"] = lr * factor

    def clip(self, scaler: torch.amp.GradScaler, max_norm: float) -> Tensor:
        """Unscale the gradients and clip them by their global norm (0 = no clipping). Returns the norm before that."""
        for member in self.members:
            scaler.unscale_(member)
        return whole(nn.utils.clip_grad_norm_(self.parameters, max_norm if max_norm > 0 else float("inf")))

    def apply(self, scaler: torch.amp.GradScaler) -> None:
        """Step with the gradients that `clip` left, and clear them; where an overflow stops one member, all stop."""
        # the scaler judges each member by its own gradients, but those of all were clipped by a norm that overflowed
        if len(self.members) == 1 or not scaler.is_enabled() or self.norm().isfinite():
            for member in self.members:
                scaler.step(member)
        self.discard(scaler)

    def discard(self, scaler: torch.amp.GradScaler) -> None:
        """Clear the gradients after `clip`; without `apply` before it, the weights stay as they are."""
        scaler.update()
        self.zero_grad()

    def norm(self) -> Tensor:
        """The global norm of the gradients, 0-d."""
        return whole(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    @torch.no_grad()
    def step_scaled(self, norm: Tensor, max_norm: float, refused: Tensor | None = None) -> None:
        """Step with gradients clipped from their `norm` to `max_norm` (0 = no clipping), and clear them.

        Only for `fused` optimizers: their kernel clips as it reads the gradients, which needs no pass of its own. All
        is decided on the device; the host waits for nothing.

        Args:
            norm: 0-d float32, the global norm of the gradients.
            max_norm: the largest norm, 0 or more.
            refused: 0-d float32; where it is 1, weights, moments and step counts stay as they are.
        """
        divisor = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm > 0 else None  # the 1e-6 of clip_grad_norm_
        for member in self.members:
            member.grad_scale, member.found_inf = divisor, refused  # type: ignore[attr-defined]
            member.step()
            del member.grad_scale, member.found_inf  # type: ignore[attr-defined]
        self.zero_grad()

    def update(self, scaler: torch.amp.GradScaler, max_norm: float) -> Tensor:
        """Clip the gradients and step with them. Returns the norm before clipping."""
        if self.fused and not scaler.is_enabled() and self.parameters[0].is_cuda:
            norm = self.norm()
            self.step_scaled(norm, max_norm)
            return norm
        norm = self.clip(scaler, max_norm)
        self.apply(scaler)
        return norm

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of the only member, or of all under ``members``."""
        states = [member.state_dict() for member in self.members]
        return states[0] if len(states) == 1 else {"members": states}

    def parameter_at(self, path: Sequence[str]) -> Tensor | None:
        """The parameter of a tensor in `state_dict`, whose keys are `path`; None if no parameter has it.

        With one member they are ("state", "7", "exp_avg"), with several ("members", "0", "state", "7", "exp_avg").
        """
        number, rest = (int(path[1]), path[2:]) if path[0] == "members" else (0, path)
        groups = self.members[number].param_groups if number < len(self.members) else []
        parameters = [p for group in groups for p in group["params"]]
        return parameters[int(rest[1])] if rest[0] == "state" and int(rest[1]) < len(parameters) else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the moments; learning rates, decay and betas stay as this run's command gave them.

        ``members`` may also be a dict from their numbers, as a sharded checkpoint has it.
        """
        states = state.get("members", [state])
        if isinstance(states, Mapping):
            states = [states[number] for number in sorted(states)]
        if len(states) != len(self.members):
            raise ValueError(
                f"the checkpoint was trained with {len(states)} optimizer(s), this command uses {len(self.members)}; "
                f"give the same --optimizer"
            )
        for member, saved in zip(self.members, states):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in member.param_groups]
            member.load_state_dict({**saved, "state": _cut_alike(saved["state"], member)})
            for group, own in zip(member.param_groups, settings):
                group.update(own)


def _cut_alike(state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Whole moments, cut into shards where the parameters are; numbers stay as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        index: {
            name: like_sharded(value, parameters[index]) if getattr(value, "ndim", 0) else value
            for name, value in of_one.items()
        }
        for index, of_one in state.items()
    }


def muon_and_adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    is_hidden: Callable[[str, nn.Parameter], bool],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    device: torch.device,
) -> Optimizers:
    """Muon over the parameters that `is_hidden` picks, AdamW over the rest, one learning rate for both."""
    named = list(named)
    hidden = [p for name, p in named if is_hidden(name, p)]
    rest = [(name, p) for name, p in named if not is_hidden(name, p)]
    return Optimizers(Muon(hidden, lr, weight_decay), adamw(decay_groups(rest, weight_decay), lr, betas, device))
