"""The loss in pieces against the loss with all logits: value and gradients."""

import pytest
import torch
from torch import nn

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
    monkeypatch.setattr("autoregressive.models.loss.head_loss.__defaults__", (None, rows))
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
