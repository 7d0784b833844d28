"""Random models of a few weights, as checkpoints, for the commands that draw."""

from __future__ import annotations

from pathlib import Path

import torch

from autoregressive.models.gpt import GPT_models
from tests.tiny_t5 import make_tiny_t5
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import checkpoint


def tiny_models(work: Path) -> list[object]:
    """Write a random GPT and tokenizer into `work`; returns their flags: 3 classes, 4 x 4 codes, 16 pixels."""
    torch.manual_seed(0)
    gpt = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=3)
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    checkpoint.save({"model": gpt.state_dict()}, work / "gpt.pt")
    checkpoint.save({"model": VQ_models["VQ-4-S"](codebook_size=64).state_dict()}, work / "vq.pt")
    return [
        "--gpt-model", "GPT-XS", "--num-classes", 3, "--image-size", 16,
        "--downsample-size", 4, "--vq-model", "VQ-4-S", "--codebook-size", 64,
        "--gpt-ckpt", work / "gpt.pt", "--vq-ckpt", work / "vq.pt",
        "--device", "cpu", "--precision", "none", "--cfg-scale", 2,
    ]  # fmt: skip


def tiny_text_models(work: Path) -> list[str]:
    """The same for texts, with a tiny T5: 8 text positions, 4 x 4 codes, 16 pixels."""
    make_tiny_t5(work)
    torch.manual_seed(0)
    gpt = GPT_models["GPT-XS"](
        vocab_size=64, block_size=16, model_type="t2i", cls_token_num=8, caption_dim=16, initializer_range=0.2
    )
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    checkpoint.save({"model": gpt.state_dict()}, work / "gpt.pt")
    checkpoint.save({"model": VQ_models["VQ-4-S"](codebook_size=64).state_dict()}, work / "vq.pt")
    return [str(flag) for flag in (
        "--gpt-model", "GPT-XS", "--cls-token-num", 8, "--image-size", 16, "--downsample-size", 4,
        "--vq-model", "VQ-4-S", "--codebook-size", 64, "--gpt-ckpt", work / "gpt.pt", "--vq-ckpt", work / "vq.pt",
        "--t5-path", work, "--t5-model-type", "tiny", "--device", "cpu", "--precision", "none", "--engine", "eager",
    )]  # fmt: skip
