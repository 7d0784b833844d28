"""From a command's arguments to the autoencoders of the diffusers package (Stable Diffusion, consistency decoder).

diffusers is an optional extra: nothing else here needs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.nearest import exact_arithmetic
from tokenizer.reconstruction import Autoencoder
from utils.seeding import mix_seed

VAES = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse", "sdxl-vae": "stabilityai/sdxl-vae"}
CONSISTENCY_DECODER = "openai/consistency-decoder"


def add_vae_args(parser: argparse.ArgumentParser) -> None:
    """Which autoencoder of Stable Diffusion."""
    parser.add_argument("--vae", choices=list(VAES), default="sd-vae-ft-mse", help="which one")
    parser.add_argument("--vae-path", help="a local folder or another repository of the hub to load it from")
    _add_latent_args(parser)


def add_decoder_args(parser: argparse.ArgumentParser) -> None:
    """Where the consistency decoder is."""
    parser.add_argument("--cd-path", default=CONSISTENCY_DECODER, help="a local folder or repository of the hub")
    _add_latent_args(parser)


def _add_latent_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample-latents",
        action="store_true",
        help="draw the latents, as the established scripts do, each image with a seed of its own; "
        "without, the likeliest latents are taken",
    )


def load_vae(source: str, device: torch.device) -> nn.Module:
    """An `AutoencoderKL` in float32 and evaluation mode, from the hub or a local folder."""
    return _load("AutoencoderKL", source, device, torch.float32)


def load_consistency_decoder(source: str, device: torch.device) -> nn.Module:
    """A `ConsistencyDecoderVAE` in evaluation mode, from the hub or a local folder: float16, on a CPU float32."""
    return _load("ConsistencyDecoderVAE", source, device, torch.float16 if device.type == "cuda" else torch.float32)


def _load(kind: str, source: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("this tokenizer needs the package diffusers: pip install diffusers") from error
    if Path(source).exists() and not Path(source, "config.json").is_file():
        raise FileNotFoundError(f"{source} is no folder of a diffusers model: it has no config.json")
    try:
        model = getattr(diffusers, kind).from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise ValueError(
            f"cannot load the model {source}: {_first_line(error)}; without a connection, download it elsewhere and "
            f"give the folder"
        ) from error
    return model.to(device).eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def stride_of(model: Any) -> int:
    """Pixels per latent in each direction."""
    return 2 ** (len(model.config.block_out_channels) - 1)


def latent_autoencoder(args: argparse.Namespace, model: Any, name: str, facts: Mapping[str, Any]) -> Autoencoder:
    """A model of this file as the commands use it; `facts` say which one it is."""
    through = partial(vae_reconstruct, model, sample=args.sample_latents, seed=args.global_seed)
    return Autoencoder(name, stride_of(model), through, {**facts, "sample_latents": args.sample_latents})


def vae_reconstruct(model: Any, images: Tensor, indices: Sequence[int], *, sample: bool, seed: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] through the latents and back, float32.

    What is random (the latents with `sample`, the noise that a consistency decoder starts from) depends on `seed` and
    the number of the image alone.
    """
    generators = [torch.Generator(images.device).manual_seed(mix_seed(seed, index)) for index in indices]
    with exact_arithmetic(images.device.type):
        distribution = model.encode(images.to(model.dtype)).latent_dist
        latents = distribution.mode()
        if sample:
            noise = [torch.randn(latents.shape[1:], generator=g, device=g.device) for g in generators]
            latents = latents + distribution.std * torch.stack(noise).to(latents.dtype)
        random = {"generator": generators} if type(model).__name__ == "ConsistencyDecoderVAE" else {}
        return model.decode(latents, **random).sample.float()
