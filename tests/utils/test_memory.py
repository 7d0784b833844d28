"""Memory of training, by hand."""

import pytest

from utils.memory import Weights, images_that_fit, state_bytes

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
