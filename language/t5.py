"""The T5 encoder: captions become the features that condition the text-to-image GPT (paper, section 3.3)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5EncoderModel

from language.embedder import TextEmbedder

DEFAULT_CACHE = Path("~/.cache/llamagen-t5")
HUB_IDS = {name: f"google/{name}" for name in ("t5-v1_1-xxl", "t5-v1_1-xl", "flan-t5-xl")}


class T5Embedder(TextEmbedder):
    """A frozen T5 encoder with its tokenizer.

    Args:
        device: where the encoder runs and the features lie.
        dir_or_name: a folder with a saved encoder and tokenizer, one of `available_models`, or any hub id.
        local_cache: read only `{cache_dir}/{dir_or_name}`, never the network.
        cache_dir: root of the local folders; the download cache when `local_cache` is off.
        hf_token: token for gated hub repositories.
        use_text_preprocessing: clean captions as the released models expect; else lower-case and strip.
        t5_model_kwargs: further keywords for `T5EncoderModel.from_pretrained`; they go first.
        torch_dtype: dtype of the weights and the features, bfloat16 by default.
        use_offload_folder: keep layers that do not fit on the device in this folder (needs `accelerate`).
        model_max_length: number of tokens every caption is padded or cut to.

    Raises:
        ValueError: when the encoder is not where it should be, or `accelerate` is needed and missing.
    """

    available_models = list(HUB_IDS)

    def __init__(
        self,
        device: torch.device | str,
        dir_or_name: str = "t5-v1_1-xxl",
        *,
        local_cache: bool = False,
        cache_dir: str | Path | None = None,
        hf_token: str | None = None,
        use_text_preprocessing: bool = True,
        t5_model_kwargs: dict[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
        use_offload_folder: str | Path | None = None,
        model_max_length: int = 120,
    ) -> None:
        self.torch_dtype = torch_dtype or torch.bfloat16
        self.use_text_preprocessing = use_text_preprocessing
        cache = Path(cache_dir or DEFAULT_CACHE).expanduser()
        source = _find_source(dir_or_name, cache, local_cache)
        offload = _offload_options(use_offload_folder)
        options = {"dtype": self.torch_dtype, **offload, **(t5_model_kwargs or {})}
        hub = {"cache_dir": str(cache), "token": hf_token, "local_files_only": local_cache}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **hub)
            model = T5EncoderModel.from_pretrained(source, **hub, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the T5 encoder {source!r} could not be loaded ({_first_line(error)}); without network, "
                f"save it with its tokenizer in a folder and give that folder, "
                f"or put it at {cache / dir_or_name} and set local_cache"
            ) from error
        if "device_map" not in options:
            model = model.to(device)
        super().__init__(Path(dir_or_name).name, tokenizer, model, device, model_max_length)

    def text_preprocessing(self, text: str) -> str:
        """The text the tokenizer sees for a caption."""
        if not self.use_text_preprocessing:
            return text.lower().strip()
        from language.text_cleaning import clean_caption  # needs packages that nothing else does

        return clean_caption(text)


def _find_source(dir_or_name: str, cache: Path, local_cache: bool) -> str:
    folder = cache / dir_or_name if local_cache else Path(dir_or_name).expanduser()
    if folder.is_dir():
        return str(folder)
    if local_cache:
        raise ValueError(
            f"no T5 encoder at {folder}: put the saved encoder (config.json, weights, tokenizer) there "
            f"or give the right cache_dir and name"
        )
    return HUB_IDS.get(dir_or_name, dir_or_name)


def _offload_options(folder: str | Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("use_offload_folder needs the package accelerate: pip install accelerate")
    return {"device_map": "auto", "offload_folder": str(folder)}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
