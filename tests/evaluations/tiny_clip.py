"""A CLIP of random weights in a few kilobytes, with a tokenizer that knows single letters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!'-"
START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_clip(folder: Path) -> Path:
    """Write it into `folder`, in the format of Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = len(tokens) - 1
    text = {**small, "vocab_size": len(tokens), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config={**text, "projection_dim": 8},
        vision_config={**small, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():  # strong enough weights that captions and pictures make a difference
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    model.save_pretrained(folder)
    return folder
