"""Codes and pictures do not depend on what else is in the batch, with one thread or two."""

import pytest
import torch

from tokenizer.coding import decode_codes, encode_images
from tokenizer.tokenizer_image.vq_model import VQ_models

SIZES = (1, 3, 15, 16)  # one thread rounds differently for 1 and 16, two threads for 1


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["VQ-16", "VQ-4-S"])  # a wide one, and a narrow one
def tokenizer(request):
    torch.manual_seed(0)
    return VQ_models[request.param]().eval().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def codes():
    return torch.randint(512, (16, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def in_parts(of, tokenizer, rows):
    return [torch.cat([of(tokenizer, part) for part in rows.split(size)]) for size in SIZES]


def test_pictures(tokenizer, codes):
    *parts, whole = in_parts(decode_codes, tokenizer, codes)
    edge = 2 * tokenizer.stride
    assert whole.shape == (16, 3, edge, edge) and whole.dtype == torch.float32
    assert all(torch.equal(part, whole) for part in parts)


def test_codes(tokenizer, codes):
    """Not the codes alone, which hide what rounding does until there is a tie: all that the quantizer sees."""
    images, seen = decode_codes(tokenizer, codes), []
    watch = tokenizer.quant_conv.register_forward_hook(lambda *call: seen.append(call[-1]))
    *parts, whole = in_parts(encode_images, tokenizer, images)
    watch.remove()
    assert whole.shape == (16, 4) and whole.dtype == torch.int32 and len(whole.unique()) > 4
    assert all(torch.equal(part, whole) for part in parts)
    rounds = torch.cat(seen).view(len(SIZES), 16, *seen[0].shape[1:])
    assert all(torch.equal(part, rounds[-1]) for part in rounds)
