"""What a batch is made of, for a class and for a text condition: its data sets, and the model's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoregressive.build import latent_grid
from autoregressive.models.text_condition import text_attention_mask
from autoregressive.train.extraction import encode_crops, load_fitting_tokenizer
from dataset.augmentation import eval_transform
from dataset.build import build_dataset
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.distributed import get_world_size, sum_over_ranks

_CHECKED = 256  # files that are read once before the training begins


class ClassInputs:
    """Codes and labels: a batch is codes (B, 1, N) int64 and labels (B, 1) int64."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device

    def training_set(self) -> Dataset:
        """The codes of --code-path."""
        if not self.args.code_path:
            raise ValueError("--code-path is missing: give the folder that extract_codes_c2i.py wrote")
        return self.codes(self.args.code_path)

    def codes(self, code_path: str) -> Dataset:
        """The codes under `code_path` with their labels."""
        return code_dataset(self.args, code_path)

    def __call__(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """The arguments of `Transformer.forward`, on the device."""
        codes, labels = (x.to(self.device, non_blocking=True) for x in batch)
        codes = codes.flatten(1)
        return {"idx": codes[:, :-1], "cond_idx": labels.flatten(), "targets": codes}

    def shares(self, batches: Sequence[Sequence[Tensor]]) -> list[float]:
        """What each micro-batch's mean loss counts in the mean over the step: all the same."""
        return [1 / len(batches)] * len(batches)


class TextInputs:
    """Images or codes with text features: a batch is (content, features, key mask, valid), see `dataset.t2i`.

    The content is codes (B, 1, N), or with a tokenizer images (B, 3, S, S), which are encoded on the fly.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        if args.dataset not in ("t2i", "t2i_code"):
            raise ValueError(f"--dataset {args.dataset} has no texts; give t2i (images) or t2i_code (extracted codes)")
        for flag in ["t5_feat_path", "code_path" if args.dataset == "t2i_code" else "data_path"]:
            if not getattr(args, flag):
                raise ValueError(f"--{flag.replace('_', '-')} is missing; --dataset {args.dataset} needs it")
        self.args, self.device = args, device
        self.tokenizer: VQModel | None = None
        if args.dataset == "t2i":
            self.tokenizer = load_fitting_tokenizer(args, device)
            made = (args.image_size // self.tokenizer.stride) ** 2, self.tokenizer.config.codebook_size
            wanted = latent_grid(args) ** 2, args.vocab_size
            if made != wanted:
                raise ValueError(
                    f"the tokenizer makes {made[0]} codes of {made[1]} from an image, the GPT is for {wanted[0]} codes "
                    f"of {wanted[1]}; --downsample-size and --vocab-size must fit --vq-model and --codebook-size"
                )

    def training_set(self) -> Dataset:
        """The images of --data-path, or the codes of --code-path, with their features."""
        if self.tokenizer is None:
            return self.codes(self.args.code_path)
        args = argparse.Namespace(**{**vars(self.args), "compact_mask": True})
        return build_dataset(args, transform=eval_transform(args.image_size))

    def codes(self, code_path: str) -> Dataset:
        """The codes under `code_path` with their text features."""
        return code_dataset(argparse.Namespace(**{**vars(self.args), "compact_mask": True}), code_path)

    def __call__(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """The arguments of `Transformer.forward`, on the device."""
        content, features, text, valid = (x.to(self.device, non_blocking=True) for x in batch)
        codes = encode_crops(self.tokenizer, content[:, None]) if content.is_floating_point() else content
        codes = codes.flatten(1)
        image = torch.ones(codes.shape[0], codes.shape[1] - 1, dtype=torch.bool, device=self.device)
        mask = text_attention_mask(torch.cat([text, image], dim=1))
        return {
            "idx": codes[:, :-1],
            "cond_idx": features.flatten(1, 2),
            "targets": codes,
            "mask": mask,
            "valid": valid,
        }

    def shares(self, batches: Sequence[Sequence[Tensor]]) -> list[float]:
        """What each micro-batch's mean over its valid samples counts in the mean over the step.

        The mean is over the valid samples of all processes: a process with few of them counts for as much less.
        """
        counts = torch.tensor([float(batch[3].sum()) for batch in batches], dtype=torch.float64)
        total = sum_over_ranks(counts.sum()).item()  # by the CPUs, so that none waits for its GPU
        return (counts * get_world_size() / max(total, 1.0)).tolist()


Inputs = ClassInputs | TextInputs


def make_inputs(args: argparse.Namespace, device: torch.device) -> Inputs:
    """The inputs of --gpt-type."""
    return (ClassInputs if args.gpt_type == "c2i" else TextInputs)(args, device)


def code_dataset(args: argparse.Namespace, code_path: str) -> Any:
    """Codes under `code_path` with labels, or for --gpt-type t2i with text features.

    Each item is checked against the vocabulary and the classes when it is read.

    Raises:
        ValueError: when the codes are of another grid than --image-size and --downsample-size say.
    """
    name = "t2i_code" if args.gpt_type == "t2i" else args.dataset
    codes = build_dataset(argparse.Namespace(**{**vars(args), "code_path": code_path, "dataset": name}))
    grid = latent_grid(args)
    if codes.num_tokens != grid**2:
        raise ValueError(
            f"{code_path} holds {codes.num_tokens} codes an image; --image-size {args.image_size} with "
            f"--downsample-size {args.downsample_size} makes {grid} x {grid} = {grid**2}"
        )
    for index in range(0, len(codes), max(len(codes) // _CHECKED, 1)):
        codes[index]  # a wrong vocabulary or class count is found before any training
    return codes
