"""The models that come with the project: small enough, and as good as their README says."""

import io
import math
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from autoregressive.models.text_condition import text_attention_mask
from autoregressive.sample.pipeline import load_models
from autoregressive.sample.text import TextConditions
from autoregressive.serve.cards import EMOJI, bundled_cards, with_values
from dataset.augmentation import eval_transform
from dataset.openmoji import draw_png, list_emojis, split_emojis
from evaluations.image_quality import psnr
from tokenizer.coding import decode_codes, encode_images

README = (EMOJI / "README.md").read_text()
CPU = torch.device("cpu")


def figure(row: str) -> float:
    """The number that the README's table gives in a row."""
    return float(re.search(rf"^\| {re.escape(row)}[^|]*\| \**([\d.]+)", README, flags=re.MULTILINE)[1])


@pytest.fixture(scope="module")
def held_out():
    """The held-out drawings, and images (95, 3, 64, 64) of them in [-1, 1]."""
    emojis = split_emojis(list_emojis(), 0.05, 0, "subgroup")["val"]
    transform = eval_transform(64)
    pictures = [Image.open(io.BytesIO(draw_png(emoji.hexcode, 128))).convert("RGB") for emoji in emojis]
    return emojis, torch.stack([transform(picture) for picture in pictures])


@pytest.fixture(scope="module")
def models():
    """Card, GPT and tokenizer of each kind, and what encodes texts."""
    of_classes, of_texts = (with_values(card, {"device": "cpu", "engine": "eager"}) for card in bundled_cards())
    text = TextConditions(of_texts.args, CPU)
    return {card.kind: (card, *load_models(card.args, CPU, card.kind)) for card in (of_classes, of_texts)}, text


def test_all_weights_together_are_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in EMOJI.glob("*.safetensors")) <= 16e6


def test_the_tokenizer_is_as_good_as_its_readme_says(models, held_out):
    _, _, tokenizer = models[0]["c2i"]
    _, images = held_out
    drawn = decode_codes(tokenizer, encode_images(tokenizer, images)).clamp(-1, 1)
    assert len(images) == 95
    assert psnr(drawn, images, 2.0).mean() == pytest.approx(figure("held-out PSNR"), abs=0.05)


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_the_gpts_are_as_good_as_their_readme_says(models, held_out, kind):
    card, engine, tokenizer = models[0][kind]
    emojis, images = held_out
    codes = encode_images(tokenizer, images).long()
    if kind == "c2i":
        condition = {"cond_idx": torch.tensor([card.classes.find(emoji.label("subgroup")) for emoji in emojis])}
    else:
        features, text = models[1].encode([emoji.name for emoji in emojis])
        shown = torch.cat([text.bool(), torch.ones(len(codes), codes.shape[1] - 1, dtype=torch.bool)], dim=1)
        condition = {"cond_idx": features, "mask": text_attention_mask(shown)}
    expected = figure(f"held-out bits per code, {card.name}")
    assert bits(engine.model, codes, condition) == pytest.approx(expected, abs=0.01)


@torch.no_grad()
def bits(model, codes, condition):
    """Bits per code of codes (B, N)."""
    logits, _ = model(codes[:, :-1], **condition)
    return F.cross_entropy(logits.transpose(1, 2), codes).item() / math.log(2)
