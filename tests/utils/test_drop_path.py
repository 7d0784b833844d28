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


class Count:
    """A backend of torch.compile that compiles nothing and counts the graphs it is given."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_blocks_of_twelve_rates_share_one_compilation():
    torch._dynamo.reset()
    count, x = Count(), torch.ones(600, 4)
    layers = [DropPath(0.05 + 0.07 * i).train() for i in range(12)]
    torch.manual_seed(0)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=count, fullgraph=True)
        kept = layer(x)
        share = (kept[:, 0] > 0).float().mean().item()
        assert share == pytest.approx(1 - layer.drop_prob, abs=0.07)
        assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - layer.drop_prob)])
        assert (kept == kept[:, :1]).all()
    assert count.graphs == 1
    assert layers[0].eval()(x).equal(x)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_compiled_layers_know_the_outermost_rates(rate):
    torch._dynamo.reset()
    layer = DropPath(rate).train()
    x = torch.randn(64, 3)
    assert torch.compile(layer, backend="eager")(x).equal(x * (1 - rate))


def test_blocks_of_a_model_share_two_compilations_and_sharding_keeps_the_rates():
    """The first block, which drops nothing, is another program than the rest."""
    torch._dynamo.reset()
    config = ModelArgs(dim=16, n_layer=12, n_head=2, vocab_size=8, num_classes=3, block_size=4, drop_path_rate=0.5)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    keep = [layer.drop_path.keep_prob.item() for layer in model.layers[1:]]
    assert keep == pytest.approx([1 - 0.5 * i / 11 for i in range(1, 12)])
    count = Count()
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend=count)
    codes = torch.zeros(2, 4, dtype=torch.int64)
    model.train()(codes[:, :-1], codes[:, 0], targets=codes)[1].backward()
    assert count.graphs == 2


def test_a_shorter_format_of_the_model_leaves_the_rate_alone():
    layer = DropPath(0.1).to(torch.bfloat16)
    assert layer.keep_prob.item() == pytest.approx(0.9, abs=1e-7) and not layer.state_dict()
