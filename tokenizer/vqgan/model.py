"""The taming-transformers VQGAN: the model, and where its published configs and checkpoints lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizer.layers import CodeAutoencoder
from tokenizer.vqgan.layer import Decoder, Encoder
from tokenizer.vqgan.quantize import VectorQuantizer2 as VectorQuantizer
from utils import checkpoint

# name: (config, checkpoint), both relative to the repository root
VQGAN_FROM_TAMING = {
    "vqgan_imagenet_f16_1024": (
        "tokenizer/vqgan/configs/vqgan_imagenet_f16_1024.yaml",
        "pretrained_models/vqgan_imagenet_f16_1024/ckpts/last.pth",
    ),
    "vqgan_imagenet_f16_16384": (
        "tokenizer/vqgan/configs/vqgan_imagenet_f16_16384.yaml",
        "pretrained_models/vqgan_imagenet_f16_16384/ckpts/last.pth",
    ),
    "vqgan_openimage_f8_256": (
        "tokenizer/vqgan/configs/vqgan_openimage_f8_256.yaml",
        "pretrained_models/vq-f8-n256/model.pth",
    ),
    "vqgan_openimage_f8_16384": (
        "tokenizer/vqgan/configs/vqgan_openimage_f8_16384.yaml",
        "pretrained_models/vq-f8/model.pth",
    ),
}


class VQModel(CodeAutoencoder):
    """Encoder, quantizer and decoder. Images are (B, 3, H, W) in [-1, 1], sides multiples of the stride.

    Args:
        ddconfig: keywords of `Encoder` and `Decoder`.
        n_embed: number of codes.
        embed_dim: channels of a code.
        ckpt_path: checkpoint to load, see `init_from_ckpt`.
        ignore_keys: key prefixes to leave out of that checkpoint.
        remap, sane_index_shape: see `VectorQuantizer2`.

    Further keywords of the published configs (`lossconfig`, `monitor`, ...) concern training only.
    """

    def __init__(
        self,
        ddconfig: dict[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        *,
        remap: str | None = None,
        sane_index_shape: bool = False,
        **_training_options: Any,
    ) -> None:
        encoder = Encoder(**ddconfig)
        super().__init__(
            encoder,
            Decoder(**ddconfig),
            VectorQuantizer(n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape),
            stride=2 ** (len(encoder.down) - 1),
            z_channels=ddconfig["z_channels"],
            code_channels=embed_dim,
        )
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), logging: bool = True) -> None:
        """Load ``{"state_dict": ...}``. The weights of the training losses (`loss.*`) are left out.

        Args:
            ignore_keys: prefixes of further keys to leave out; the model keeps its own values there.
            logging: print what was loaded.

        Raises:
            ValueError: any other key is missing or too many, or the file is no such checkpoint.
        """
        content = checkpoint.read(path)
        if "state_dict" not in content:
            raise ValueError(f"{path} must hold a 'state_dict', but holds {sorted(content)}.")
        left_out = ("loss.", *ignore_keys)
        weights = {k: v for k, v in content["state_dict"].items() if not k.startswith(left_out)}
        missing, unexpected = self.load_state_dict(weights, strict=False)
        missing = [key for key in missing if not key.startswith(left_out)]
        if missing or unexpected:
            raise ValueError(f"{path} is of another model: it lacks {missing} and has {unexpected} too many.")
        if logging:
            print(f"Loaded {len(weights)} tensors from {path}")
