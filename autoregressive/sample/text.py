"""What sampling from prompts adds to sampling from classes: a text encoder, its flags, and a list of what was drawn."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from autoregressive.models.generate import Caption
from autoregressive.models.text_condition import left_pad_text
from language.build import add_text_encoder_args, load_text_encoder
from utils.files import write_atomic

# Two of them are of the kind of PartiPrompts; the words are our own.
PROMPTS = (
    "A kangaroo in an orange hoodie and blue sunglasses stands on the grass before the opera house of Sydney.",
    "A blue Porsche is parked before a yellow brick wall.",
    "An astronaut rides a white horse through a forest, and a river shows their reflection.",
    "A map of the United States made of sushi lies on a table, beside a glass of red wine.",
)


def add_text_args(flags: argparse.ArgumentParser) -> None:
    """The text encoder, and how its features are used."""
    group = flags.add_argument_group("text")
    add_text_encoder_args(group)
    group.set_defaults(t5_feature_max_len=None)
    group.add_argument("--t5-feature-dim", type=int, help="compared with the encoder's width, if given")
    group.add_argument("--no-left-padding", action="store_true", help="the text stands at the left of its positions")
    group.add_argument("--negative-prompt", help="a text that the pictures are led away from (needs guidance)")


class TextConditions:
    """Turns prompts into what `generate` takes.

    Sets ``args.caption_dim`` to the encoder's width, so make it before the GPT.

    Raises:
        ValueError: when the encoder is missing, or does not fit the other flags.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        if args.gpt_type != "t2i":
            raise ValueError("this command draws prompts; --gpt-type c2i is not for it")
        if args.t5_feature_max_len is None:
            args.t5_feature_max_len = args.cls_token_num
        if args.t5_feature_max_len > args.cls_token_num:
            raise ValueError(
                f"--t5-feature-max-len {args.t5_feature_max_len} is more than --cls-token-num {args.cls_token_num}, "
                f"the text positions of the GPT"
            )
        self.positions, self.left = args.cls_token_num, not args.no_left_padding
        self.encoder = load_text_encoder(args, args.t5_path, device)
        if args.t5_feature_dim not in (None, self.encoder.width):
            raise ValueError(
                f"--t5-feature-dim is {args.t5_feature_dim}, but a token of {self.encoder.name} has "
                f"{self.encoder.width} numbers; leave the flag out, or choose the encoder that the GPT was trained with"
            )
        args.caption_dim = self.encoder.width
        self.negative = None if args.negative_prompt is None else self.encode([args.negative_prompt])

    def encode(self, prompts: Sequence[str]) -> Caption:
        """Features (B, positions, width), zero where there is no text, and their mask (B, positions).

        Each prompt is encoded by itself: its features must not depend on those beside it.
        """
        parts = [self.encoder.get_text_embeddings([prompt]) for prompt in prompts]
        features, mask = (torch.cat(column) for column in zip(*parts))
        if not features.isfinite().all():
            raise ValueError("the text encoder gave features that are not finite; try --precision bf16 or none")
        missing = self.positions - mask.shape[1]
        features, mask = F.pad(features, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        return left_pad_text(features, mask) if self.left else (features * mask[..., None], mask)

    def __call__(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keywords of `generate`."""
        features, mask = self.encode(prompts)
        return {"cond": features, "emb_masks": mask, "negative": self.negative}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt; warns of prompts that are empty or lose their end."""
        ids, lost = self.encoder.tokenize(prompts)
        for number, (prompt, cut) in enumerate(zip(prompts, lost)):
            if cut:
                limit = self.encoder.model_max_length
                print(f"warning: prompt {number} has {cut} tokens more than {limit}: its end is cut", file=sys.stderr)
            if not self.encoder.text_preprocessing(prompt):
                print(f"warning: prompt {number} is empty: its picture is of nothing in particular", file=sys.stderr)
        return [len(tokens) for tokens in ids]


def write_manifest(folder: Path, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """``result.jsonl`` and ``captions.txt`` about the pictures ``{folder}/images/{number:06d}.png``."""
    entries = [
        json.dumps({"text": prompt, "image_path": str(folder / "images" / f"{i:06d}.png"), "seed": seed})
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    captions = [" ".join(prompt.split()) for prompt in prompts]
    for name, lines in (("result.jsonl", entries), ("captions.txt", captions)):
        content = "".join(line + "\n" for line in lines).encode()
        write_atomic(folder / name, lambda file, content=content: file.write(content))
