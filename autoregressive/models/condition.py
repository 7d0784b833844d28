"""Embedders of the condition: a class label or the features of a caption."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _drop_rows(count: int, prob: float, force_drop_ids: Tensor | None, device: torch.device) -> Tensor:
    """Which samples lose their condition, bool (count,): at random, or exactly where forced to (1)."""
    if force_drop_ids is None:
        return torch.rand(count, device=device) < prob
    return force_drop_ids == 1


class LabelEmbedder(nn.Module):
    """Class labels to one prefix token each.

    The null class of classifier-free guidance is row `num_classes` of the table; it exists if `dropout_prob`
    > 0.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Replace labels (B,) by the null class with probability `dropout_prob`, or where forced to (1)."""
        drop = _drop_rows(labels.shape[0], self.dropout_prob, force_drop_ids, labels.device)
        return torch.where(drop, self.num_classes, labels)

    def null_condition(self, labels: Tensor) -> Tensor:
        """The null class, shaped like `labels` (B,). ValueError if the model has none."""
        if self.embedding_table.num_embeddings <= self.num_classes:
            raise ValueError("this model has no null class (class_dropout_prob is 0): use cfg_scale <= 1")
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        """int64 (B,) to (B, 1, hidden_size). Labels are dropped in training, and wherever forced to."""
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels).unsqueeze(1)


class MLP(nn.Module):
    """Two linear layers without bias around a tanh-approximated GELU."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=False)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Caption features to prefix tokens.

    `uncond_embedding` (token_num, in_channels) is the empty caption. It is never trained. Its last row
    belongs to the position just before the image, so a caption of T positions is replaced by its last T rows.
    """

    def __init__(self, in_channels: int, hidden_size: int, uncond_prob: float, token_num: int = 120) -> None:
        super().__init__()
        self.cap_proj = MLP(in_channels, hidden_size, hidden_size)
        self.register_buffer("uncond_embedding", torch.randn(token_num, in_channels) / in_channels**0.5)
        self.uncond_prob = uncond_prob

    def token_drop(self, caption: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Empty captions (B, T, C) with probability `uncond_prob`, or where forced to (1)."""
        drop = _drop_rows(caption.shape[0], self.uncond_prob, force_drop_ids, caption.device)
        return torch.where(drop[:, None, None], self.null_condition(caption), caption)

    def null_condition(self, caption: Tensor) -> Tensor:
        """The empty caption, shaped and typed like `caption` (B, T, C). ValueError if T exceeds the table."""
        rows, length = self.uncond_embedding.shape[0], caption.shape[1]
        if length > rows:
            raise ValueError(f"the caption has {length} positions, the unconditional embedding only {rows}")
        return self.uncond_embedding[rows - length :].to(caption.dtype).expand_as(caption)

    def forward(self, caption: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        """(B, T, in_channels) to (B, T, hidden_size). Captions drop in training, and wherever forced to."""
        if (train and self.uncond_prob > 0) or force_drop_ids is not None:
            caption = self.token_drop(caption, force_drop_ids)
        return self.cap_proj(caption)


def caption_projection(state: Mapping[str, Tensor]) -> MLP:
    """The projection of caption features to embeddings alone, from a whole GPT's state dict and in its format."""
    prefix = "cls_embedding.cap_proj."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    with torch.device("meta"):
        mlp = MLP(weights["fc1.weight"].shape[1], *weights["fc2.weight"].T.shape)
    mlp.load_state_dict(weights, assign=True)
    return mlp.requires_grad_(False)
