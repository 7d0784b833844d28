"""Memory of training, by hand."""

import pytest

from autoregressive.models.config import ModelArgs
from utils.memory import Weights, compiled_block_bytes, images_that_fit, state_bytes

WEIGHTS = Weights(blocks=3, block=100, root=50)  # 350 parameters


def test_state_by_hand():
    assert WEIGHTS.total == 350
    assert state_bytes(WEIGHTS, "ddp") == 350 * (16 + 2)
    assert state_bytes(WEIGHTS, "ddp", ema=True) == 350 * (20 + 2)
    reducing = 100 * (2 + 4)
    assert state_bytes(WEIGHTS, "fsdp", 2) == 350 * 16 // 2 + 2 * (50 + 2 * 100) + reducing
    assert state_bytes(WEIGHTS, "sdp", 2) == 350 * 16 // 2 + 2 * 350 + reducing
    assert state_bytes(WEIGHTS, "fsdp", 3) == 1867 + 2 * 250 + reducing  # 5600 / 3, rounded up


@pytest.mark.parametrize(("memory", "images"), [(1000, 9), (199, 0), (50, 0)])
def test_what_is_left_is_for_images(memory, images):
    assert images_that_fit(memory, state=100, per_image=100) == images


def test_a_compiled_block_by_hand():
    shape = ModelArgs(dim=64, n_head=4, n_kv_head=2, multiple_of=32)  # 32 channels of keys, 192 hidden ones
    assert compiled_block_bytes(shape, "full", stream=4) == 4 * 64
    kept = 2 * (128 + 64 + 2 * 192) + 4 * 4  # wqkv, attention, w1 and w3; four heads
    assert compiled_block_bytes(shape, "selective", stream=4) == 4 * 64 + kept + 2 * 64
    read = 2 * (64 + 64 + 96 + 192)  # by wqkv, by w1 and w3, by attention, by w2
    assert compiled_block_bytes(shape, "none", stream=2) == 2 * 2 * 64 + kept + read + 2 * 64
    with pytest.raises(ValueError, match="'most'"):
        compiled_block_bytes(shape, "most")
