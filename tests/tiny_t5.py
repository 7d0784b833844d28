"""A tiny T5 encoder with a tokenizer that is trained here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel

TEXT = (
    "a the cat dog red blue horse riding person photo of on in lake mountain hello world green big small car snow sun"
)


def make_tiny_t5(cache: Path) -> Path:
    """Save the encoder ``tiny`` in the folder `cache`: two layers, width 16, 46 word pieces. Returns `cache`."""
    folder = cache / "tiny"
    folder.mkdir(parents=True)
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(TEXT.split(), k=8)) for _ in range(400)]
    (cache / "text.txt").write_text("\n".join(sentences))
    torch.manual_seed(0)
    size = {"vocab_size": 46, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**size, initializer_factor=4.0)
    T5EncoderModel(config).save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        input=str(cache / "text.txt"), model_prefix=str(folder / "spiece"), vocab_size=46, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return cache
