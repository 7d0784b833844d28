"""Stochastic depth."""

from __future__ import annotations

import pytest
import torch

from autoregressive.models.gpt import ModelArgs, Transformer
from tests import golden
from utils.drop_path import DropPath, drop_path


@golden.cases("gpt.drop_path")
def test_stochastic_depth_matches_the_golden(case):
    model = Transformer(ModelArgs(**case.config["args"]))
    layers = [block.drop_path for block in model.layers]
    layer, x = DropPath(case.params["rate"]), case.tensors["x"]
    torch.manual_seed(case.params["seed"])
    trained = layer.train()(x)
    case.check(
        {
            "rates": [getattr(each, "drop_prob", 0.0) for each in layers],
            "identity_layers": [i for i, each in enumerate(layers) if isinstance(each, torch.nn.Identity)],
            "train_seeded": trained,
            "kept_rows": (trained.abs().sum((1, 2)) > 0).int().tolist(),
            "eval": layer.eval()(x),
        }
    )


def test_whole_samples_are_dropped_and_the_mean_stays():
    torch.manual_seed(0)
    out = drop_path(torch.ones(4000, 3), 0.25, training=True)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out == out[:, :1]).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_scaling_can_be_turned_off_and_rate_one_drops_everything():
    torch.manual_seed(0)
    assert set(drop_path(torch.ones(50, 1), 0.5, True, scale_by_keep=False).unique().tolist()) == {0.0, 1.0}
    assert drop_path(torch.ones(50, 1), 1.0, training=True).abs().max() == 0


def test_evaluation_returns_the_input():
    x = torch.randn(3, 2)
    assert drop_path(x, 0.9) is x
    assert DropPath(0.9).eval()(x) is x
    assert "0.900" in repr(DropPath(0.9))
