"""The likelihood of held-out codes against the model's own loss, by position, and over processes."""

import argparse
import math

import pytest
import torch

from autoregressive.train import validation
from autoregressive.train.inputs import ClassInputs, TextInputs, code_dataset
from autoregressive.train.validation import HeldOut, Validator, likelihood
from dataset.t2i import Text2ImgDatasetCode
from evaluations.nll import parser
from tests.autoregressive.models.tiny import random_model
from tests.autoregressive.train.stores import (
    C2I,
    CLASSES,
    POSITIONS,
    T2I,
    TOKENS,
    VOCABULARY,
    WIDTH,
    caption_codes,
    class_codes,
)

CPU = torch.device("cpu")
INPUTS = ClassInputs(argparse.Namespace(), CPU)
FIELDS = {"vocab_size": VOCABULARY, "block_size": TOKENS, "num_classes": CLASSES}


def held_out_codes(folder, count=7):
    args = parser().parse_args([*C2I, "--code-path", str(folder), "--gpt-ckpt", "x"])
    return code_dataset(args, class_codes(folder, count))


def own_loss(model, codes, first_views):
    """The mean loss of the images one by one, and of each position from the logits."""
    losses, nats = [], []
    for index in first_views:
        tokens, label = codes.view(index, 0)
        logits, loss = model(tokens[None, :-1], label[None], targets=tokens[None])
        losses.append(loss.item())
        nats.append(-logits[0].log_softmax(-1)[range(TOKENS), tokens])
    return sum(losses) / len(losses), torch.stack(nats).mean(0)


@torch.no_grad()
def test_it_is_the_models_loss_whatever_the_batch(tmp_path):
    model, codes = random_model(**FIELDS), held_out_codes(tmp_path)
    loss, by_position = own_loss(model, codes, range(7))
    for batch_size in (1, 3, 32):
        found = likelihood(model.train(), HeldOut(codes), INPUTS, CPU, batch_size=batch_size)
        assert found.loss == pytest.approx(loss, rel=1e-5) and found.images == 7 and model.training
        torch.testing.assert_close(found.nats, by_position.double(), rtol=1e-4, atol=1e-5)
    assert found.bits_per_token == pytest.approx(loss / math.log(2), rel=1e-5)
    assert found.bits_per_image == pytest.approx(sum(found.bits_by_position))


def test_an_untrained_model_gives_log_of_the_vocabulary_everywhere(tmp_path):
    model = random_model(head_std=0.0, **FIELDS)
    found = likelihood(model, HeldOut(held_out_codes(tmp_path)), INPUTS, CPU)
    assert found.nats.tolist() == pytest.approx([math.log(VOCABULARY)] * TOKENS)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_images_equally_and_each_counts_once(world, tmp_path, monkeypatch):
    model, codes, parts = random_model(**FIELDS), held_out_codes(tmp_path), []
    whole = likelihood(model, HeldOut(codes), INPUTS, CPU)
    monkeypatch.setattr(validation, "get_world_size", lambda: world)
    monkeypatch.setattr(validation, "sum_over_ranks", lambda total: (parts.append(total), total)[1])
    for rank in range(world):
        monkeypatch.setattr(validation, "get_rank", lambda rank=rank: rank)
        share = HeldOut(codes)
        assert len(share) == math.ceil(7 / world)
        likelihood(model, share, INPUTS, CPU, batch_size=2)
    *sums, images = sum(parts).tolist()
    assert images == 7
    torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64) / 7, whole.nats, rtol=1e-6, atol=0)


def test_some_images_spread_evenly(tmp_path):
    codes = held_out_codes(tmp_path)
    assert HeldOut(codes, 3).indices == [0, 3, 6] and HeldOut(codes, 99).indices == list(range(7))


@torch.no_grad()
def test_captions_with_their_masks_and_without_the_invalid(tmp_path):
    code_path, features = caption_codes(tmp_path, count=101)
    args = parser().parse_args([*T2I, "--code-path", str(code_path), "--t5-feat-path", str(features)])
    args.dataset = "t2i_code"
    model = random_model(model_type="t2i", cls_token_num=POSITIONS, caption_dim=WIDTH, **FIELDS)
    whole_masks = Text2ImgDatasetCode(args)
    losses = []
    for index in range(100):  # the last has no features
        tokens, text, mask, _ = whole_masks[index]
        losses.append(model(tokens[:, :-1], text, targets=tokens, mask=mask[None, :, :-1, :-1])[1].item())
    inputs = TextInputs(args, CPU)
    found = likelihood(model, HeldOut(inputs.codes(args.code_path)), inputs, CPU)
    assert found.images == 100 and found.loss == pytest.approx(sum(losses) / 100, rel=1e-5)


def test_training_reports_both_sets_of_weights(tmp_path):
    model, ema = random_model(seed=0, **FIELDS), random_model(seed=1, **FIELDS)
    share = HeldOut(held_out_codes(tmp_path))
    numbers = Validator(share, INPUTS, model, ema, CPU, "none")()
    assert list(numbers) == ["loss", "bits_per_token", "ema_loss", "ema_bits_per_token"]
    assert numbers["ema_loss"] == pytest.approx(likelihood(ema, share, INPUTS, CPU).loss) != numbers["loss"]
    assert list(Validator(share, INPUTS, model, None, CPU, "none")()) == ["loss", "bits_per_token"]
