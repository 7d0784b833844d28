"""CLIP scores, on a tiny CLIP of random weights in the format of Hugging Face."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.clip_score import Clip, clip_folder
from tests.evaluations.tiny_clip import END, tiny_clip
from utils.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(folder):
    return Clip(folder)


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_score_is_the_cosine_of_the_two_embeddings(clip, pictures):
    captions = ["a cat", "two dogs", "5 birds"]
    got = clip.cosines(pictures, captions)
    text = clip.tokens(captions)
    out = clip._model(**text, pixel_values=clip.pixels(pictures))
    want = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-6)
    assert got.abs().max() < 1  # not scaled
    flat = torch.tensor([[0, 0, 255], [255, 0, 0], [0, 0, 0], [255, 255, 0]], dtype=torch.uint8)
    assert clip.cosines(flat[:, None, None].expand(4, 8, 8, 3), ["a cat", "x", "zzz", "5"]).min() < 0  # not clamped
    assert not torch.allclose(got, clip.cosines(pictures, captions[::-1]))


def test_captions_get_the_prefix(clip):
    ids = clip.tokens(["a cat"])["input_ids"][0]
    assert clip._tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "aphotodepictsacat"


def test_long_captions_are_cut_and_keep_their_end(clip):
    tokens = clip.tokens(["word " * 100, "short"])
    assert tokens["input_ids"].shape == (2, 77)
    assert tokens["input_ids"][0, -1] == clip._tokenizer.convert_tokens_to_ids(END)
    assert tokens["attention_mask"].sum(dim=1).tolist()[0] == 77


def test_captions_are_unescaped(clip):
    plain, escaped = (clip.tokens([text])["input_ids"] for text in ("it's so", "it&amp;#39;s so"))
    assert torch.equal(plain, escaped)


def test_pixels_are_resized_as_pillow_does_it(clip, pictures):
    got = clip.pixels(pictures)
    assert got.shape == (3, 3, 32, 32)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for picture, image in zip(pictures, got):
        resized = np.array(Image.fromarray(picture.numpy()).resize((32, 32), Image.Resampling.BICUBIC))
        levels = image.permute(1, 2, 0).numpy() * std + mean
        assert np.abs(levels * 255 - resized).max() < 1e-3


def test_counts_must_match(clip, pictures):
    with pytest.raises(ValueError, match="3 pictures need as many captions, found 2"):
        clip.cosines(pictures, ["a", "b"])


def test_padding_does_not_change_a_score(clip, pictures):
    alone = clip.cosines(pictures[:1], ["a cat"])
    torch.testing.assert_close(alone, clip.cosines(pictures, ["a cat", "a very long caption", "b"])[:1])


def test_a_folder_that_is_no_clip(tmp_path):
    with pytest.raises(ValueError, match="is no CLIP folder"):
        Clip(tmp_path)


def test_weights_of_another_model(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    torch.save({"logit_scale": torch.tensor(1.0)}, broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="missing"):
        Clip(broken)


def test_weights_that_hold_code_are_refused(folder, tmp_path):
    hostile = shutil.copytree(folder, tmp_path / "hostile")
    (hostile / "model.safetensors").unlink()
    torch.save({"logit_scale": Image.new}, hostile / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="was refused"):
        Clip(hostile)


def test_without_network_the_error_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert str(clip_folder("ViT-B/32", "some/folder")) == "some/folder"
    with pytest.raises(ValueError, match=r"--clip-weights.*--clip_model4eval WO"):
        clip_folder("ViT-B/32", None)
