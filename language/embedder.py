"""What every text encoder does: captions in, one vector per token out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class TextEmbedder:
    """A frozen encoder of transformers with its tokenizer.

    Args:
        name: what made the features, for manifests and messages.
        tokenizer: a tokenizer of transformers.
        model: an encoder whose output has `last_hidden_state` (B, T, width).
        device: where the features are to lie.
        model_max_length: tokens of a caption, special tokens included; longer captions lose their end.
    """

    def __init__(
        self, name: str, tokenizer: Any, model: nn.Module, device: torch.device | str, model_max_length: int
    ) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.model = model.eval().requires_grad_(False)
        self.device = torch.device(device)
        self.model_max_length = model_max_length

    @property
    def width(self) -> int:
        """Length of a token's vector, the `caption_dim` of a GPT that takes these features."""
        return self.model.config.hidden_size

    def text_preprocessing(self, text: str) -> str:
        """The text that the tokenizer sees for a caption."""
        return text.strip()

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """The token ids of each caption, cut to `model_max_length`, and how many tokens each lost by that."""
        cleaned = [self.text_preprocessing(text) for text in texts]
        cut = self.tokenizer(cleaned, truncation=True, max_length=self.model_max_length)["input_ids"]
        lost = [0] * len(cut)
        for i, ids in enumerate(cut):
            if len(ids) == self.model_max_length:
                lost[i] = len(self.tokenizer(cleaned[i], verbose=False)["input_ids"]) - len(ids)
        return cut, lost

    def get_text_embeddings(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions.

        Returns:
            features (B, model_max_length, width) in the dtype of the encoder, and the attention mask
            (B, model_max_length) int64: ones for the tokens of the caption, then zeros. The rows under ones
            do not depend on `model_max_length` as long as the caption fits.
        """
        return self._features(self.tokenize(texts)[0], padding="max_length")

    def encode_tokens(self, ids: Sequence[list[int]]) -> list[Tensor]:
        """The features (n, width) of captions that `tokenize` cut, without padding."""
        features, mask = self._features(ids, padding="longest")
        return [rows[:length] for rows, length in zip(features, mask.sum(dim=1).tolist())]

    @torch.no_grad()
    def _features(self, ids: Sequence[list[int]], padding: str) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer.pad(
            {"input_ids": list(ids)},
            padding=padding,
            max_length=self.model_max_length,
            padding_side="right",
            return_tensors="pt",
            verbose=False,
        ).to(self.device)
        features = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return features.last_hidden_state.detach(), tokens["attention_mask"]
