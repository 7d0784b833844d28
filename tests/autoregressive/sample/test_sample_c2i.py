"""Drawing: which images depend on what."""

import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from autoregressive.sample.pipeline import decode_codes
from autoregressive.sample.sample_c2i import class_ids, draw, parser
from tokenizer.tokenizer_image.vq_model import VQ_models

SAMPLING = {"cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=5).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


def arguments(*flags):
    return parser().parse_args(["--cfg-scale", "2", "--top-k", "0", "--num-classes", "5", *flags])


def test_an_image_depends_on_its_number_not_on_its_batch(gpt):
    labels = torch.tensor([0, 3, 3, 1, 4])
    whole = draw(gpt, labels, arguments("--seed", "7"))
    pairs = draw(gpt, labels, arguments("--seed", "7", "--batch-size", "2"))
    assert torch.equal(whole, pairs)
    assert not torch.equal(whole[1], whole[2])  # the same class twice: two pictures
    assert not torch.equal(whole, draw(gpt, labels, arguments("--seed", "8")))


def test_legacy_draws_are_those_of_the_global_generator(gpt):
    labels = torch.tensor([0, 3, 2])
    torch.manual_seed(7)
    expected = generate(gpt, labels, 16, sample_logits=True, **SAMPLING)
    assert torch.equal(draw(gpt, labels, arguments("--seed", "7", "--legacy-rng")), expected)


def test_codes_become_pictures_in_any_batch():
    torch.manual_seed(0)
    tokenizer = VQ_models["VQ-4-S"]().eval()
    codes = torch.randint(512, (5, 16), dtype=torch.int32)
    whole = decode_codes(tokenizer, codes)
    assert whole.shape == (5, 3, 16, 16)
    torch.testing.assert_close(decode_codes(tokenizer, codes, batch_size=2), whole, atol=1e-5, rtol=0)


def test_classes_by_number_and_name(tmp_path):
    (tmp_path / "names.json").write_text('["cat", "dog", "2"]')
    flags = ["--class-names", str(tmp_path / "names.json"), "--images-per-class", "2", "--class-labels"]
    assert class_ids(arguments(*flags, "dog", "0", "2")) == [1, 1, 0, 0, 2, 2]
    with pytest.raises(ValueError, match="unknown class 'bird'"):
        class_ids(arguments(*flags, "bird"))
    with pytest.raises(ValueError, match=r"class 5 is out of range.* 0 \.\. 4"):
        class_ids(arguments("--class-labels", "5"))
