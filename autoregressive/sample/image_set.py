"""A whole set of sampled pictures, for evaluation: which pictures, under which name, and the drawing of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.build import checkpoint_tag
from autoregressive.models.generate import Model
from autoregressive.sample.pipeline import load_models, make_decoder, sample_codes
from dataset.packed import sha256_of
from evaluations.render import Drawn, beside, render
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.args import apply_threads
from utils.batches import is_out_of_memory
from utils.checkpoint import file_of
from utils.distributed import is_main, process_group
from utils.image import resize_bicubic, to_uint8
from utils.seeding import mix_seed

# Settings that the established folder name leaves out; they are added where they are not the default.
EXTRA_NAMES = {
    "cfg_interval": "interval",
    "cfg_start": "start",
    "cfg_schedule": "schedule",
    "cfg_power": "power",
    "min_p": "minp",
    "temperature_end": "temperature-end",
    "temperature_schedule": "temperature-schedule",
    "precision": "precision",
    "decode_precision": "decode",
    "quantize": "quantize",
    "kv_cache_dtype": "kv-cache",
    "use_ema": "ema",
    "balanced_labels": "balanced",
}
# Flags that say where, how fast and how many, not what the pictures are.
NOT_A_SETTING = (
    "compile", "device", "from_fsdp", "gpt_ckpt", "npz", "num_fid_samples", "num_threads", "num_workers",
    "per_proc_batch_size", "sample_dir", "vq_ckpt",
)  # fmt: skip

# Settings that came with time: their defaults are not noted, so that sets begun before there was a choice go on.
_LATER_DEFAULTS = {"decode_precision": "none", "kv_cache_dtype": "auto"}


def sample_image_set(args: argparse.Namespace, defaults: Mapping[str, Any]) -> Path:
    """Draw pictures 0 to --num-fid-samples - 1 into the folder of `folder_name`, and all into the npz beside it.

    `defaults` are the command's own: what differs from them is part of the folder's name. Returns the folder.
    """
    args = argparse.Namespace(**{**vars(args), "image_size_eval": eval_size(args)})
    for name in ("num_fid_samples", "per_proc_batch_size", "image_size_eval"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    apply_threads(args)
    with process_group(args.device) as device:
        gpt, tokenizer = load_models(args, device)
        folder = render(
            SetPainter(gpt, tokenizer, args),
            args.num_fid_samples,
            Path(args.sample_dir, folder_name(args, defaults)),
            batch_size=args.per_proc_batch_size,
            settings=settings(args),
            npz=args.npz,
        )
        if is_main():
            made = f", and all of them to {beside(folder, '.npz')}" if args.npz else ""
            print(f"{args.num_fid_samples} pictures are saved to {folder}{made}")
    return folder


def eval_size(args: argparse.Namespace) -> int:
    """The edge of the saved pictures: 256, or that of smaller images, unless --image-size-eval says otherwise."""
    return min(256, args.image_size) if args.image_size_eval is None else args.image_size_eval


def folder_name(args: argparse.Namespace, defaults: Mapping[str, Any], subject: str = "") -> str:
    """The established name of a set of samples (with `subject` behind the checkpoint), and what it would not tell
    apart."""
    name = (
        f"{args.gpt_model}-{checkpoint_tag(args.gpt_ckpt, args.from_fsdp)}{subject}-size-{args.image_size}"
        f"-size-{eval_size(args)}-{args.vq_model}-topk-{args.top_k}-topp-{args.top_p}"
        f"-temperature-{args.temperature}-cfg-{args.cfg_scale}-seed-{args.global_seed}"
    )
    for setting, word in EXTRA_NAMES.items():
        value = getattr(args, setting, defaults.get(setting))
        if value != defaults.get(setting):
            name += f"-{word}" if value is True else f"-{word}-{value}"
    return name


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the pictures. The checkpoints are known by their content, as many have the same name."""
    decide = {name: value for name, value in vars(args).items() if name not in NOT_A_SETTING}
    for name, default in _LATER_DEFAULTS.items():
        if decide[name] == default:
            del decide[name]
    if is_main():  # it alone compares them
        decide |= {f"{kind}_sha256": sha256_of(file_of(getattr(args, f"{kind}_ckpt"))) for kind in ("gpt", "vq")}
    return decide


def label_of(index: int, args: argparse.Namespace) -> int:
    """The class of picture `index`: with --balanced-labels all classes in turn, else random, made of the seed and
    `index` alone."""
    if args.balanced_labels:
        return index % args.num_classes
    return mix_seed(args.global_seed, index, 1) % args.num_classes


class SetPainter:
    """Draws pictures by their numbers, at --image-size-eval, with class and seed as notes.

    On a GPU, whose kernels depend on the number of rows, a smaller batch is filled up: so it rounds like the others,
    and compiled shapes are used again.
    """

    def __init__(self, gpt: Model, tokenizer: VQModel, args: argparse.Namespace) -> None:
        self.gpt, self.args, self.decode = gpt, args, make_decoder(args, tokenizer)
        self.device = gpt.tok_embeddings.weight.device
        self.rows = min(args.per_proc_batch_size, args.num_fid_samples) if self.device.type == "cuda" else 1

    def __call__(self, indices: list[int]) -> Drawn:
        """The pictures of these numbers."""
        try:
            images = self._images(indices + indices[-1:] * (self.rows - len(indices)))[: len(indices)]
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self.rows = max(1, self.rows // 2)
            raise
        notes = [{"index": i, **self.facts(i), "seed": self.seed(i)} for i in indices]
        return Drawn(to_uint8(images), notes)

    def facts(self, index: int) -> dict[str, Any]:
        """What picture `index` is of."""
        return {"class_id": label_of(index, self.args)}

    def conditions(self, indices: list[int]) -> dict[str, Any]:
        """What the GPT is to draw, as keywords of `generate`."""
        return {"cond": torch.tensor([label_of(i, self.args) for i in indices], device=self.device)}

    def seed(self, index: int) -> int:
        """The seed of picture `index`."""
        return self.args.global_seed + index

    def _images(self, indices: list[int]) -> Tensor:
        seeds = [self.seed(i) for i in indices]
        codes = sample_codes(self.gpt, args=self.args, seeds=seeds, **self.conditions(indices))
        images = self.decode(codes)
        if eval_size(self.args) != self.args.image_size:
            images = resize_bicubic(images, eval_size(self.args))
        return images
