"""Counter-based noise: the generator against its published vectors, its distribution, what it depends on."""

from __future__ import annotations

import math

import torch

from autoregressive.models.generate import generate
from autoregressive.models.noise import ImageNoise, exponential_noise, philox
from tests.autoregressive.models.tiny import random_model

# Known answers of philox4x32-10, from the Random123 library (kat_vectors): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def test_philox_gives_its_published_vectors():
    for counter, key, expected in KNOWN:
        words = lambda text: tuple(torch.tensor([int(word, 16)]) for word in text.split())  # noqa: E731
        assert [int(word) for word in philox(words(counter), words(key))] == [int(w, 16) for w in expected.split()]


def test_noise_is_exponential_and_independent_over_images_and_positions():
    noise = torch.stack([exponential_noise(torch.tensor([3, 4]), position, 20_000) for position in (0, 1)])
    flat = noise.flatten(0, 1)
    assert (flat > 0).all()
    torch.testing.assert_close(flat.mean(1), torch.ones(4), atol=0.03, rtol=0)
    for quantile in (0.01, 0.5, 0.99):
        share = (flat < -math.log1p(-quantile)).float().mean(1)
        torch.testing.assert_close(share, torch.full((4,), quantile), atol=0.015, rtol=0)
    correlations = torch.corrcoef(flat) - torch.eye(4)
    assert correlations.abs().max() < 0.03


def test_noise_depends_on_all_64_bits_of_the_seed_on_the_position_and_not_on_the_count():
    seeds = torch.tensor([1, 1 + 2**40, 2**62 + 1])
    rows = exponential_noise(seeds, 5, 10)
    assert len({tuple(row.tolist()) for row in rows}) == 3
    assert torch.equal(exponential_noise(seeds, 5, 7), rows[:, :7])
    assert torch.equal(exponential_noise(seeds, torch.tensor([5]), 10), rows)
    assert not torch.equal(exponential_noise(seeds, 6, 10), rows)
    assert torch.equal(exponential_noise(seeds[1:2], 5, 10), rows[1:2])


def test_image_noise_counts_tokens():
    noise = ImageNoise([8, 9])
    assert len(noise) == 2
    first, second = noise.exponential(6), noise.exponential(6)
    assert torch.equal(first, exponential_noise(torch.tensor([8, 9]), 0, 6))
    assert torch.equal(second, ImageNoise([8, 9], position=1).exponential(6))


def test_an_image_depends_on_its_seed_not_on_its_batch():
    model, labels = random_model(), torch.tensor([0, 1, 1, 4])
    options = {"cfg_scale": 2.0, "temperature": 1.1, "top_k": 30, "top_p": 0.97}
    batch = generate(model, labels, 9, generators=ImageNoise([7, 8, 9, 10]), **options)
    for i in range(4):
        single = generate(model, labels[i : i + 1], 9, generators=ImageNoise([7 + i]), **options)
        assert torch.equal(single[0], batch[i])
    turned = generate(model, labels.flip(0), 9, generators=ImageNoise([10, 9, 8, 7]), **options)
    assert torch.equal(turned.flip(0), batch)
    assert not torch.equal(batch[1], batch[2])
