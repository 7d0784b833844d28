"""Number formats of the decoder, and how batches are cut on a GPU: there on tensors with a device, but no values."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from autoregressive.serve.cards import bundled_cards
from dataset.augmentation import eval_transform
from dataset.openmoji import draw_png, list_emojis
from evaluations.image_quality import psnr
from tests.tokenizer.test_vqgan import TINY
from tokenizer.build import load_tokenizer
from tokenizer.coding import ImageDecoder, ImageEncoder, decode_codes, encode_images, layout_of
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.vqgan.model import VQModel as VQGAN
from utils.precision import DTYPES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def emoji():
    """The tokenizer that comes with the project, and the codes of eight drawings."""
    tokenizer, transform = load_tokenizer(bundled_cards()[0].args, CPU), eval_transform(64)
    drawings = [io.BytesIO(draw_png(emoji.hexcode, 128)) for emoji in list_emojis()[:400:50]]
    images = torch.stack([transform(Image.open(drawing).convert("RGB")) for drawing in drawings])
    return tokenizer, encode_images(tokenizer, images)


@pytest.mark.parametrize(("precision", "least"), [("bf16", 50), ("fp16", 70)])
def test_a_decoder_in_half_precision_is_close(emoji, precision, least):
    tokenizer, codes = emoji
    decoder, expected = ImageDecoder(tokenizer, precision), decode_codes(tokenizer, codes)
    formats = []
    watch = decoder.decode[1].norm_out.register_forward_hook(lambda _, inputs, out: formats.append(out.dtype))
    images = decoder(codes)
    watch.remove()
    assert set(formats) == {decoder.decode[0].weight.dtype} == {DTYPES[precision]}
    assert images.dtype == torch.float32 and images.shape == (8, 3, 64, 64)
    closeness = psnr(images.clamp(-1, 1), expected.clamp(-1, 1), 2.0)
    assert least < closeness.min() and closeness.max() < 100  # another format, so other roundings
    assert torch.equal(torch.cat([decoder(one) for one in codes.split(1)]), images)


def test_the_tokenizer_is_left_as_it_is(emoji):
    tokenizer, codes = emoji
    before = decode_codes(tokenizer, codes[:2])
    decoder = ImageDecoder(tokenizer, "bf16")
    decoder(codes[:2])
    assert tokenizer.decoder.conv_in.weight.dtype == torch.float32
    assert torch.equal(decode_codes(tokenizer, codes[:2]), before)
    plain = ImageDecoder(tokenizer)
    assert plain.decode[1] is tokenizer.decoder and torch.equal(plain(codes[:2]), before)


def test_a_grid_need_not_be_square():
    torch.manual_seed(0)
    tokenizer, codes = VQ_models["VQ-4-S"]().eval(), torch.arange(12).view(2, 6)
    expected = tokenizer.decode_code(codes, (2, 8, 2, 3))
    torch.testing.assert_close(ImageDecoder(tokenizer)(codes, (2, 3)), expected, atol=1e-5, rtol=0)
    vqgan = VQGAN(TINY, 16, 4).eval()
    expected = vqgan.decode_code(codes, (2, 4, 2, 3))
    torch.testing.assert_close(ImageDecoder(vqgan)(codes, (2, 3)), expected, atol=1e-5, rtol=0)


def test_compiled_batches_are_filled_up_to_a_power_of_two(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    with torch.device("meta"):
        tokenizer = VQ_models["VQ-4-S"]().eval()
        decoder, seen = ImageDecoder(tokenizer, "bf16", compiled=True, batch_size=12), []
        decoder.decode.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
        counts = [len(decoder(torch.zeros(count, 16, dtype=torch.int32))) for count in (12, 5, 1, 15)]
    assert compiled == [(decoder.decode, {"dynamic": False})] and decoder.decode[1] is not tokenizer.decoder
    assert counts == [12, 5, 1, 15] and [len(quant) for quant in seen] == [12, 8, 1, 12, 4]
    assert all(quant.dtype == torch.bfloat16 for quant in seen)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    seen.clear()
    decoder.warm_up(16)
    assert [quant.shape for quant in seen] == [(size, 8, 4, 4) for size in (1, 2, 4, 8, 12)]
    with torch.device("meta"):
        plain = ImageDecoder(tokenizer, "bf16")
        plain.decode.register_forward_hook(lambda *_: pytest.fail("nothing is compiled, so nothing is prepared"))
    plain.warm_up(16)


@pytest.mark.parametrize(("compiled", "device", "layout"), [
    (False, "cpu", torch.channels_last), (False, "cuda", torch.contiguous_format), (True, "cuda", torch.channels_last),
])  # fmt: skip
def test_the_layout_suits_the_device(compiled, device, layout):
    assert layout_of(device, compiled) is layout


def test_a_gpu_takes_32_images_at_a_time_and_nothing_waits_for_it():
    with FakeTensorMode(), torch.device("cuda"):
        tokenizer, seen = VQ_models["VQ-4-S"]().eval(), []
        for module in (tokenizer.encoder, tokenizer.decoder):
            module.register_forward_hook(lambda _, inputs, out: seen.append(len(inputs[0])))
        codes = encode_images(tokenizer, torch.zeros(70, 3, 16, 16))
        images = decode_codes(tokenizer, codes)
        encode_images(tokenizer, images, batch_size=50)
    assert codes.shape == (70, 16) and images.shape == (70, 3, 16, 16) and images.device.type == "cuda"
    assert seen == [32, 32, 6, 32, 32, 6, 50, 20]


def test_decoding_remembers_what_fits_and_passes_on_that_nothing_does():
    with FakeTensorMode(), torch.device("cuda"):
        tokenizer, tried, limit = VQ_models["VQ-4-S"]().eval(), [], 20

        def limited(_, inputs):
            tried.append(len(inputs[0]))
            if tried[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")

        tokenizer.decoder.register_forward_pre_hook(limited)
        codes = torch.zeros(40, 16, dtype=torch.int32)
        shapes = [decode_codes(tokenizer, codes).shape for _ in range(2)]
        assert shapes == [(40, 3, 16, 16)] * 2 and tried == [32, 16, 16, 8, 16, 16, 8]
        limit = 0
        with pytest.raises(torch.OutOfMemoryError):
            decode_codes(tokenizer, codes)
    assert tried[7:] == [16, 8, 4, 2, 1]


def test_batches_stay_smaller_once_the_memory_did_not_suffice(capsys):
    with FakeTensorMode(), torch.device("cuda"):
        tokenizer, tried = VQ_models["VQ-4-S"]().eval(), []

        def limited(_, inputs):
            tried.append(len(inputs[0]))
            if tried[-1] > 10:
                raise torch.OutOfMemoryError("CUDA out of memory")

        tokenizer.encoder.register_forward_pre_hook(limited)
        encode = ImageEncoder(tokenizer)
        shapes = [encode(torch.zeros(40, 3, 16, 16)).shape for _ in range(2)]
    assert shapes == [(40, 16)] * 2
    assert tried == [32, 16, *[8] * 5, *[8] * 5]
    assert capsys.readouterr().out.count("out of memory") == 2


def test_precision_of_encoding_decides_about_tf32_and_nothing_else():
    seen = []
    tokenizer = VQ_models["VQ-4-S"]().eval()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    tokenizer.encoder.register_forward_hook(
        lambda *_: seen.append((cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark))
    )
    before = cudnn.allow_tf32, cudnn.deterministic
    images = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact, reduced = (encode_images(tokenizer, images, precision=name) for name in ("exact", "tf32"))
    assert seen == [(False, False, True, False), (True, False, True, False)]
    assert torch.equal(exact, reduced) and (cudnn.allow_tf32, cudnn.deterministic) == before
    with pytest.raises(ValueError, match="exact or tf32, not as 'bf16'"):
        encode_images(tokenizer, images, precision="bf16")
    with pytest.raises(ValueError, match="at least 1, found 0"):
        encode_images(tokenizer, images, batch_size=0)
