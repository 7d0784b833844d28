"""The loss in pieces against the loss with all logits: value and gradients."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoregressive.models import loss as loss_module
from autoregressive.models.loss import piece_rows
from tests.autoregressive.models.tiny import random_model
from utils.precision import autocast

CPU = torch.device("cpu")
VALID = torch.tensor([1, 0, 1])


def loss_and_gradients(model, valid, precision="none", **options):
    torch.manual_seed(0)
    codes, labels = torch.randint(50, (3, 9)), torch.tensor([0, 4, 2])
    model.zero_grad()
    with autocast(CPU, precision):
        logits, loss = model(codes[:, :-1], labels, targets=codes, valid=valid, **options)
    (3 * loss).backward()  # as a loss scaler does
    return logits, loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("valid", [None, VALID, torch.zeros(3)])
@pytest.mark.parametrize("rows", [1, 4, 27, 1000])
def test_value_and_gradients_are_those_of_all_logits(valid, rows, monkeypatch):
    monkeypatch.setattr("autoregressive.models.loss.ROWS", rows)
    model = random_model()
    _, loss, gradients = loss_and_gradients(model, valid)
    logits, own_loss, own_gradients = loss_and_gradients(model, valid, loss_only=True)
    assert logits is None
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_as_close_as_autocast_itself():
    model = random_model()
    _, exact, gradients = loss_and_gradients(model, None)
    _, usual, _ = loss_and_gradients(model, None, "bf16")
    _, loss, own = loss_and_gradients(model, None, "bf16", loss_only=True)
    assert loss.dtype == torch.float32 and abs(loss - usual) < 1e-4 * abs(exact)
    for name, gradient in gradients.items():
        assert own[name].dtype == torch.float32
        assert (own[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_one_step_of_training_is_the_same():
    ends = []
    for options in ({}, {"loss_only": True}):
        model = random_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss_and_gradients(model, VALID, **options)
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_without_gradients_only_the_value_is_computed():
    model = random_model()
    codes = torch.zeros(1, 9, dtype=torch.long)
    with torch.no_grad():
        _, loss = model(codes[:, :-1], torch.tensor([0]), targets=codes, loss_only=True)
    assert not loss.requires_grad and torch.isfinite(loss)


@pytest.mark.slow
def test_compilation_does_not_change_the_loss():
    model = random_model()
    _, loss, gradients = loss_and_gradients(model, VALID, loss_only=True)
    for block in model.layers:
        block.forward = torch.compile(block.forward, backend="aot_eager")
    _, compiled, own = loss_and_gradients(model, VALID, loss_only=True)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "vocabulary", "rows"),
    [("cpu", 16384, 1024), ("cuda", 16384, 8192), ("cuda", 4096, 8192), ("cuda", 262144, 512), ("cuda", 10**8, 128)],
)
def test_pieces_suit_the_device_and_the_vocabulary(device, vocabulary, rows):
    assert piece_rows(torch.device(device), vocabulary) == rows


def check_kernel(device="cpu"):
    """The kernel against cross entropy in float64: rows longer than a block, of odd lengths, with a stride."""
    from autoregressive.models.loss_kernel import cross_entropy_in_place

    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-9), (torch.float16, 2**-12)):
        for rows, columns, stride in ((3, 8192, 8192), (5, 4097, 4104), (4, 50, 50), (1, 1, 1)):
            wide = (4 * torch.randn(rows, stride, device=device)).to(dtype)
            logits = wide[:, :columns]
            targets = torch.randint(columns, (rows,), device=device)
            targets[-1] = columns - 1
            exact = logits.double().requires_grad_()
            losses = F.cross_entropy(exact, targets, reduction="none")
            losses.sum().backward()
            before = wide.clone()
            found = cross_entropy_in_place(logits, targets, with_gradient=False)
            torch.testing.assert_close(found, losses.float(), rtol=1e-5, atol=1e-5)
            assert torch.equal(wide, before)
            assert torch.equal(cross_entropy_in_place(logits, targets, with_gradient=True), found)
            torch.testing.assert_close(logits.double(), exact.grad, rtol=4 * tolerance, atol=1e-6)
            assert torch.equal(wide[:, columns:], before[:, columns:])  # what lies between the rows is not touched
    broken = torch.zeros(2, 100, device=device)
    broken[0, 7] = float("nan")
    losses = cross_entropy_in_place(broken, torch.zeros(2, dtype=torch.int64, device=device), with_gradient=False)
    assert losses.isnan().tolist() == [True, False]


def check_loss_by_the_kernel(device="cpu"):
    """The loss in pieces by the kernel against that of all logits at once: value and gradients."""
    from autoregressive.models.loss_kernel import cross_entropy_in_place

    torch.manual_seed(0)
    h, weight = torch.randn(3, 9, 16, device=device), torch.randn(200, 16, device=device)
    targets, valid = torch.randint(200, (3, 9), device=device), VALID.to(device)
    inputs = [[h.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2)]
    each = F.cross_entropy((inputs[0][0] @ inputs[0][1].T).flatten(0, 1), targets.flatten(), reduction="none")
    expected = (each.view(3, 9) * valid[:, None]).sum() / 18
    by_kernel = lambda logits, *rest: (cross_entropy_in_place(logits, *rest), logits)  # noqa: E731
    with mock.patch.object(loss_module, "_cross_entropy", by_kernel):
        loss = loss_module.head_loss(*inputs[1], targets, valid, rows=10)
    for value in (expected, loss):
        value.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(inputs[1], inputs[0]):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not loss_module._HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("check", ["check_kernel", "check_loss_by_the_kernel"])
def test_the_kernel_interpreted_on_the_cpu(check):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", f"import {__name__} as module; module.{check}()"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
