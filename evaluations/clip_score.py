"""CLIP score: how well pictures show what their captions say (Hessel et al., 2021, arXiv:2104.08718).

The convention of the text-to-image papers that LlamaGen compares with: the mean cosine between the embeddings of
the picture and of "A photo depicts " + caption, neither scaled nor clamped. `torchmetrics`' CLIPScore is another number
(times 100, clamped at 0, without the prefix).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from utils import checkpoint
from utils.files import sha256_of

PREFIX = "A photo depicts "
HUB_IDS = {"ViT-B/32": "openai/clip-vit-base-patch32", "ViT-G/14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"}

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_FILES = ["*.json", "merges.txt", "model.safetensors", "pytorch_model.bin"]
_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # in older files


class Clip:
    """A CLIP model and its tokenizer from a folder in the format of Hugging Face.

    Raises:
        ValueError: when the folder lacks a part.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        folder, self.device = Path(folder), torch.device(device)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is no CLIP folder: expected config.json, model.safetensors and the tokenizer's files, "
                f"as save_pretrained and the Hugging Face hub give them"
            )
        config = CLIPConfig.from_pretrained(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} has no usable tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
                             ) from error  # fmt: skip
        model = CLIPModel(config)
        checkpoint.load_weights(model, folder, ignore=_BUFFERS)
        self._model = model.to(self.device).eval().requires_grad_(False)
        self.text_length: int = config.text_config.max_position_embeddings
        self.image_size: int = config.vision_config.image_size
        self.label = f"CLIP, weights {sha256_of(checkpoint.file_of(folder))[:16]}"

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids (n, length) and mask of the captions with the prefix, cut to the length CLIP was trained with.

        Captions are mended and unescaped as the original tokenizer does it; one that is too long keeps its end mark.
        """
        texts = [PREFIX + html.unescape(html.unescape(ftfy.fix_text(caption))).strip() for caption in captions]
        options = {"padding": "max_length", "max_length": self.text_length, "truncation": True, "return_tensors": "pt"}
        return dict(self._tokenizer(texts, **options))

    def pixels(self, pictures: Tensor) -> Tensor:
        """Square pictures uint8 (n, H, H, 3) as CLIP's vision tower takes them: float32 (n, 3, size, size).

        Resized by Pillow with bicubic weights, as the established preprocessing does.
        """
        resized = np.stack([self._resized(picture) for picture in pictures.cpu().numpy()])
        images = torch.from_numpy(resized).to(self.device).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (_MEAN, _STD))
        return (images / 255 - mean) / std

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        size = (self.image_size, self.image_size)
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))

    @torch.inference_mode()
    def cosines(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine (n,), float64, of each of the square pictures uint8 (n, H, H, 3) with its caption.

        Raises:
            ValueError: when there is not one caption for each picture.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures need as many captions, found {len(captions)}")
        texts = {name: value.to(self.device) for name, value in self.tokens(captions).items()}
        out = self._model(
            input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=self.pixels(pictures)
        )
        images, words = (
            x.double() / x.double().norm(dim=-1, keepdim=True) for x in (out.image_embeds, out.text_embeds)
        )
        return (images * words).sum(dim=-1)


def clip_folder(model: str, weights: str | None) -> Path:
    """The folder of CLIP `model` ("ViT-B/32" or "ViT-G/14"): `weights`, or the copy of the Hugging Face hub.

    Raises:
        ValueError: when it is neither given, nor in the hub's cache, nor can be downloaded.
    """
    if weights:
        return Path(weights)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_IDS[model], allow_patterns=_FILES))
    except Exception as error:  # the hub's client has many exceptions, all of which mean: not available
        raise ValueError(
            f"the CLIP model {HUB_IDS[model]} is neither in the cache nor can it be downloaded; get its files where "
            f"there is a network and give their folder with --clip-weights, or leave the CLIP score out with "
            f"--clip_model4eval WO"
        ) from error
