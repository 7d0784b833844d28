"""A picture of every prompt of a list, for evaluation. `sample_t2i_ddp.py` is its command."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.gpt import Transformer
from autoregressive.sample.image_set import SetPainter, folder_name, settings
from autoregressive.sample.pipeline import load_models
from autoregressive.sample.text import TextConditions, write_manifest
from dataset.prompts import read_prompts
from evaluations.render import render
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.args import apply_threads
from utils.distributed import is_main, process_group

# Where things are, not what the pictures are of: the prompts themselves are compared.
_NOT_A_SETTING = ("prompt_csv", "t5_path", "t5_feature_dim")


def sample_prompt_set(args: argparse.Namespace, defaults: Mapping[str, Any]) -> Path:
    """Draw a picture of each of the first --num-fid-samples prompts into ``{folder}/images``.

    `defaults` are the command's own: what differs from them is part of the folder's name. ``result.jsonl`` lists
    the pictures with prompt and seed, ``captions.txt`` the prompts, ``images.json`` the settings. Returns the folder.
    """
    for name in ("num_fid_samples", "per_proc_batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    listed = read_prompts(args.prompt_csv)
    prompts = listed[: args.num_fid_samples]
    args = argparse.Namespace(**{**vars(args), "image_size_eval": args.image_size, "num_fid_samples": len(prompts)})
    apply_threads(args)
    with process_group(args.device) as device:
        conditions = TextConditions(args, device)
        gpt, tokenizer = load_models(args, device, "t2i")
        if is_main():
            conditions.token_counts(prompts)  # for its warnings
        source = Path(args.prompt_csv).name.split(".")[0].lower()
        folder = Path(args.sample_dir, folder_name(args, defaults, f"-{source}"))
        painter = PromptPainter(gpt, tokenizer, args, prompts, conditions)
        render(
            painter,
            len(prompts),
            folder / "images",
            batch_size=args.per_proc_batch_size,
            settings=_settings(args, listed),
            npz=False,
        )
        if is_main():
            write_manifest(folder, prompts, [painter.seed(i) for i in range(len(prompts))])
            print(f"{len(prompts)} pictures are saved to {folder / 'images'}")
    return folder


def _settings(args: argparse.Namespace, listed: Sequence[str]) -> dict[str, Any]:
    """What decides the pictures; all prompts of the list, so that more of them can be drawn later."""
    decide = {name: value for name, value in settings(args).items() if name not in _NOT_A_SETTING}
    return decide | {"prompts_sha256": hashlib.sha256("\n".join(listed).encode()).hexdigest()}


class PromptPainter(SetPainter):
    """Draws picture i of prompt i."""

    def __init__(
        self,
        gpt: Transformer,
        tokenizer: VQModel,
        args: argparse.Namespace,
        prompts: Sequence[str],
        conditions: TextConditions,
    ) -> None:
        super().__init__(gpt, tokenizer, args)
        self.prompts, self.encode = prompts, conditions

    def facts(self, index: int) -> dict[str, Any]:
        """The prompt of picture `index`."""
        return {"prompt": self.prompts[index]}

    @torch.no_grad()
    def conditions(self, indices: list[int]) -> dict[str, Any]:
        """The features of the prompts."""
        return self.encode([self.prompts[i] for i in indices])
