"""The embedders of classes and captions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.condition import MLP, CaptionEmbedder, LabelEmbedder
from tests import golden
from tests.autoregressive.models.tiny import from_golden


@golden.cases("gpt.cond_embed")
def test_embedders_match_the_golden(case):
    embedder = from_golden(case).cls_embedding
    cond, forced = case.tensors["cond"], case.tensors["force_drop_ids"]
    prob = case.config["args"]["class_dropout_prob"]
    torch.manual_seed(case.params["seed"])
    seeded_drop_ids = (torch.rand(len(cond)) < prob).int().tolist()
    torch.manual_seed(case.params["seed"])
    case.check(
        {
            "train_seeded": embedder(cond, train=True),
            "seeded_drop_ids": seeded_drop_ids,
            "eval": embedder(cond, train=False),
            "train_forced": embedder(cond, train=True, force_drop_ids=forced),
            "eval_forced": embedder(cond, train=False, force_drop_ids=forced),
            "dropped_cond": embedder.token_drop(cond, forced),
        }
    )


def test_the_null_row_exists_only_with_dropping():
    assert LabelEmbedder(10, 4, 0.1).embedding_table.weight.shape == (11, 4)
    assert LabelEmbedder(10, 4, 0.0).embedding_table.weight.shape == (10, 4)
    with pytest.raises(ValueError, match="no null class"):
        LabelEmbedder(10, 4, 0.0).null_condition(torch.tensor([1]))


def test_labels_are_dropped_at_the_given_rate_in_training_only():
    torch.manual_seed(0)
    embedder = LabelEmbedder(3, 2, 0.25)
    labels = torch.zeros(4000, dtype=torch.long)
    dropped = (embedder.token_drop(labels) == 3).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)
    assert torch.equal(embedder(labels, train=False)[7, 0], embedder.embedding_table.weight[0])


def test_the_caption_projection_uses_the_tanh_gelu():
    mlp, x = MLP(6, 8, 4), 3 * torch.randn(5, 6)
    expected = F.gelu(x @ mlp.fc1.weight.T, approximate="tanh") @ mlp.fc2.weight.T
    torch.testing.assert_close(mlp(x), expected)
    exact = F.gelu(x @ mlp.fc1.weight.T) @ mlp.fc2.weight.T
    assert (mlp(x) - exact).abs().max() > 1e-5


def test_a_dropped_caption_takes_the_last_rows_of_the_unconditional_table():
    embedder = CaptionEmbedder(6, 4, 0.5, token_num=10)
    caption = torch.randn(2, 7, 6)
    dropped = embedder.token_drop(caption, torch.tensor([0, 1]))
    assert torch.equal(dropped[0], caption[0])
    assert torch.equal(dropped[1], embedder.uncond_embedding[3:])
    with pytest.raises(ValueError, match="11 positions"):
        embedder.null_condition(torch.zeros(1, 11, 6))


def test_the_unconditional_caption_starts_with_unit_norm():
    torch.manual_seed(0)
    embedder = CaptionEmbedder(2048, 4, 0.1)
    assert embedder.uncond_embedding.shape == (120, 2048)
    torch.testing.assert_close(embedder.uncond_embedding.norm(dim=-1), torch.ones(120), atol=0.1, rtol=0)
