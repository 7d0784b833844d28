"""Samples from weights in training: an engine over a copy on a GPU that holds them whole, the model everywhere else.

Without a GPU the tests say that an engine is to sample, and make one that computes on a CPU.
"""

import copy
import gc
import logging
import weakref

import pytest
import torch

from autoregressive.engine.static import StaticEngine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.models.noise import ImageNoise
from autoregressive.train import live_sampling
from autoregressive.train.live_sampling import LiveSampler, engine_samples, sampling_copy
from tests.autoregressive.models.tiny import captions, random_model
from utils.precision import autocast

LABELS, SEEDS = torch.tensor([0, 3, 4, 1]), [11, 7, 2**62, 5]


@pytest.fixture
def engines(monkeypatch):
    """Engines sample on this CPU too; weak references to the engines that were made, and their names."""
    made = []

    def make(model):
        engine = StaticEngine(model, compile_blocks=False)
        made.append((weakref.ref(engine), weakref.ref(engine.model.output.weight), engine.model.output.weight.dtype))
        return engine

    monkeypatch.setattr(live_sampling, "engine_samples", lambda device, sharded: not sharded)
    monkeypatch.setattr(live_sampling, "make_engine", make)
    return made


def by_model(model, precision="bf16", cond=LABELS, text=None):
    """What a model samples under autocast with a generator per image."""
    with autocast(torch.device("cpu"), precision):
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        return generate(model, cond, model.block_size, text, cfg_scale=2.0, generators=generators)


def by_copy(model, cond=LABELS, text=None):
    """What a copy in bf16 samples with counted noise."""
    own = copy.deepcopy(model).bfloat16()
    return generate(own, cond, model.block_size, text, cfg_scale=2.0, generators=ImageNoise(SEEDS))


@pytest.mark.parametrize(
    ("device", "sharded", "expected"),
    [("cuda", False, True), ("cuda:1", False, True), ("cuda", True, False), ("cpu", False, False)],
)
def test_an_engine_samples_on_gpus_that_hold_the_weights_whole(device, sharded, expected):
    assert engine_samples(torch.device(device), sharded) is expected


def test_the_engine_samples_what_a_copy_in_bf16_samples_and_is_freed(engines):
    model = random_model().train()
    weights = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    with LiveSampler("bf16", 2.0, sharded=False).sampling(model) as sample:
        codes = sample(LABELS, SEEDS, None)
        assert torch.equal(codes[1:2], sample(LABELS[1:2], SEEDS[1:2], None))
        assert len(engines) == 1 and engines[0][0]() is not None  # one engine for all batches
    assert torch.equal(codes, by_copy(model)) and not torch.equal(codes, by_model(model))
    assert engines[0][0]() is None and engines[0][1]() is None and engines[0][2] == torch.bfloat16
    assert all(module.training for module in model.modules()) and model.output.weight.requires_grad
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
    assert torch.equal(random_state, torch.get_rng_state())


def test_each_block_samples_from_the_weights_of_its_time(engines):
    model, sampler = random_model(), LiveSampler("bf16", 2.0, sharded=False)
    found = []
    for _ in range(2):
        with sampler.sampling(model) as sample:
            found.append(sample(LABELS, SEEDS, None))
        expected = by_copy(model)
        assert torch.equal(found[-1], expected)
        with torch.no_grad():
            model.output.weight.mul_(-1)
    assert len(engines) == 2 and not torch.equal(*found)


def test_captions_keep_their_masks(engines):
    model = random_model(model_type="t2i", cls_token_num=5)
    features, text = captions(4, [1, 5, 3, 2], positions=5)
    with LiveSampler("bf16", 2.0, sharded=False).sampling(model) as sample:
        codes = sample(features, SEEDS, text)
    assert torch.equal(codes, by_copy(model, features, text))


def test_in_full_precision_the_engine_reads_the_weights_themselves(engines):
    model = random_model().train()
    for name, value in sampling_copy(model, "none").named_parameters():
        assert value.data_ptr() == model.get_parameter(name).data_ptr() and not value.requires_grad
    with LiveSampler("none", 2.0, sharded=False).sampling(model) as sample:
        codes = sample(LABELS, SEEDS, None)
    expected = generate(model, LABELS, model.block_size, cfg_scale=2.0, generators=ImageNoise(SEEDS))
    assert torch.equal(codes, expected) and model.training and engines[0][2] == torch.float32


def test_blocks_with_another_forward_are_copied_without_it():
    """Compiled blocks and those that recompute activations keep a reference to the model in training."""
    model = random_model()
    for block in model.layers:
        block.forward = lambda *inputs, usual=block.forward: usual(*inputs) + 1
    own = sampling_copy(model, "bf16")
    assert not any("forward" in block.__dict__ for block in own.layers)
    assert {value.dtype for value in own.state_dict().values()} == {torch.bfloat16}
    assert {value.device.type for value in own.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "on a CPU"])
def test_elsewhere_the_model_samples_as_it_always_did(sharded, request):
    if sharded:  # on a CPU there is no engine in any case: here one would be taken but for the shards
        request.getfixturevalue("engines")
    model = random_model().train()
    with LiveSampler("bf16", 2.0, sharded=sharded).sampling(model) as sample:
        assert torch.equal(sample(LABELS, SEEDS, None), by_model(model))
    assert model.training


class TooLarge(Engine):
    """An engine whose caches do not fit into memory, at the second batch."""

    batches = 0

    def new_cache(self, *shape):
        self.batches += 1
        if self.batches == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().new_cache(*shape)


def test_without_memory_for_the_caches_the_model_samples_and_that_is_said_once(engines, monkeypatch, caplog):
    made = []

    def make(model):
        engine = TooLarge(model)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(live_sampling, "make_engine", make)
    monkeypatch.setattr(logging.getLogger("llamagen"), "propagate", True)
    model, sampler = random_model(), LiveSampler("bf16", 2.0, sharded=False)
    with caplog.at_level(logging.WARNING, logger="llamagen"):
        with sampler.sampling(model) as sample:
            assert torch.equal(sample(LABELS, SEEDS, None), by_copy(model))
            assert torch.equal(sample(LABELS, SEEDS, None), by_model(model))
            assert made[0]() is None  # gone at once: the model needs the memory
        with sampler.sampling(model) as sample:
            assert torch.equal(sample(LABELS, SEEDS, None), by_model(model))
    assert len(made) == 1 and len(caplog.records) == 1
    assert "caches of 4 images (CUDA out of memory)" in caplog.text


def test_without_memory_for_the_copy_the_model_samples(engines, monkeypatch, caplog):
    def no_copy(model, precision):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(live_sampling, "sampling_copy", no_copy)
    model = random_model()
    with LiveSampler("bf16", 2.0, sharded=False).sampling(model) as sample:
        assert torch.equal(sample(LABELS, SEEDS, None), by_model(model))
    assert engines == []


def test_an_error_inside_frees_the_copy_too(engines):
    with pytest.raises(KeyError), LiveSampler("bf16", 2.0, sharded=False).sampling(random_model()) as sample:
        sample(LABELS, SEEDS, None)
        raise KeyError
    gc.collect()
    assert engines[0][1]() is None
