"""The PyTorch Inception against what TensorFlow computed with the same graph, and its reading of other graphs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evaluations.features import feature_statistics, frechet
from evaluations.graph_file import GraphFileError, read_graph
from evaluations.inception import (
    INPUT,
    POOL,
    SPATIAL,
    TOPOLOGY,
    GraphNetwork,
    Inception,
    ResizeBilinearTF1,
    check_topology,
)
from evaluations.metrics import manifold_radii, precision_recall
from tests.golden import FOLDER

GOLDENS = FOLDER / "evaluator"
GRAPH = GOLDENS / "inception_2048.pb"


@pytest.fixture(scope="module")
def network() -> Inception:
    return Inception(GRAPH)


@pytest.fixture(scope="module")
def pictures() -> dict[str, torch.Tensor]:
    with np.load(GOLDENS / "pictures.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.fixture(scope="module")
def tensorflow() -> dict[str, torch.Tensor]:
    """What TensorFlow 2.21 gave for `pictures`: of "ref" and "sample" every eighth."""
    with np.load(GOLDENS / "tf_outputs.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((GOLDENS / "metrics.json").read_text())


@pytest.fixture(scope="module")
def statistics(network, pictures):
    return [feature_statistics(network, pictures[n].split(32), keep_features=True) for n in ("ref", "sample")]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("name", ["odd", "sq299", "big"])
def test_features_equal_tensorflows(name, network, pictures, tensorflow):
    seen = network(pictures[name])
    close(seen["pool"], tensorflow[f"{name}_pool"])
    close(seen["spatial"], tensorflow[f"{name}_spatial"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_do_not_depend_on_the_layout(layout, network, pictures):
    other, seen = Inception(GRAPH, memory_format=layout), []
    name = next(name for name, layer in other.network.layers.items() if layer.extra_repr().startswith("conv"))
    other.network.layers[name].register_forward_hook(lambda _, inputs, out: seen.append(out))
    shown = next(iter(pictures.values()))[:2]
    found, expected = other(shown), network(shown)
    assert seen[0].is_contiguous(memory_format=layout)
    for key, value in expected.items():
        close(found[key], value)


def test_features_of_many_pictures_equal_tensorflows(network, pictures, tensorflow, statistics):
    close(statistics[0].features[::8], tensorflow["ref_pool"])
    seen = network(pictures["sample"][::8])
    close(seen["pool"], tensorflow["sample_pool"])
    close(seen["spatial"], tensorflow["sample_spatial"])
    close(statistics[1].features[::8], seen["pool"], 1e-5)  # the batch changes nothing
    assert (seen["probabilities"] - tensorflow["sample_softmax"][::8]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["odd", "big"])
def test_resizing_equals_tensorflows_bit_by_bit(name, pictures, tensorflow):
    images = pictures[name].permute(0, 3, 1, 2).float()
    resized = ResizeBilinearTF1(299, 299)(images).permute(0, 2, 3, 1)
    assert torch.equal(resized[:, ::13, ::11], tensorflow[f"{name}_resized_crop"])


def test_resizing_at_home_is_the_identity(pictures):
    images = pictures["sq299"].permute(0, 3, 1, 2).float()
    assert torch.equal(ResizeBilinearTF1(299, 299)(images), images)


def test_metrics_equal_the_established_evaluators(statistics, metrics):
    reference, samples = statistics
    established, exact = metrics["upstream"], metrics["exact"]
    assert frechet(reference, samples) == pytest.approx(exact["FID"], rel=1e-5)
    assert frechet(reference, samples) == pytest.approx(established["FID"], rel=1e-4)
    assert frechet(reference, samples, "spatial") == pytest.approx(exact["sFID"], rel=1e-5)
    assert frechet(reference, samples, "spatial") == pytest.approx(established["sFID"], rel=1e-4)
    assert samples.score.scores().mean().item() == pytest.approx(established["IS"], rel=1e-5)
    for half in (False, True):
        found = precision_recall(reference.features, samples.features, half=half)
        assert found == pytest.approx((established["precision"], established["recall"]), abs=0.005)


def test_splits_of_the_score_equal_the_established_evaluators(network, pictures, metrics):
    samples = feature_statistics(network, pictures["sample"].split(50), split_size=40)
    assert samples.score.scores().mean().item() == pytest.approx(metrics["upstream"]["IS_split40"], rel=1e-5)


@pytest.mark.parametrize("scale", [1, 1000])
def test_precision_and_recall_equal_the_established_evaluators(scale, tensorflow, metrics):
    """Float16 distances as it measures them; a thousandfold, where they overflow, it falls back to float32."""
    first, second = scale * tensorflow["F1"], scale * tensorflow["F2"]
    want = metrics["features48" if scale == 1 else "features48_x1000"]
    found = precision_recall(first, second, half=True)
    assert found == pytest.approx((want["precision"], want["recall"]), abs=0.005)
    assert precision_recall(first, second) == pytest.approx(metrics["features48"]["PR_f64"], abs=1e-9)
    if scale == 1:  # float16 sums depend on their order, by a few units of 2 ** -11
        torch.testing.assert_close(manifold_radii(first, half=True)[:, None], tensorflow["radii1"], rtol=4e-3, atol=0)


def test_unknown_weights_have_no_fid(network):
    assert not network.comparable
    assert network.label.startswith("Inception with unknown weights (")


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3), torch.zeros(8, 8, 3).byte()]
)
def test_pictures_are_checked(network, wrong):
    with pytest.raises(ValueError, match=r"pictures must be uint8 \(N, H, W, 3\), found"):
        network(wrong)


# --- other graphs


def graph_network(nodes, target: str = "conv_1") -> GraphNetwork:
    return GraphNetwork(nodes, INPUT, (target,))


def test_the_layers_of_the_published_graph_are_known():
    rows = GraphNetwork(read_graph(GRAPH), INPUT, (POOL, SPATIAL)).rows
    assert len(rows) == 122
    assert "".join(f"{name}: {row}\n" for name, row in rows.items()) == TOPOLOGY.read_text()
    # what is easy to get wrong
    assert rows["mixed_9/tower_2/pool"] == "mean 3x3/1 SAME of mixed_8/join"
    assert rows["mixed_10/tower_2/pool"] == "max 3x3/1 SAME of mixed_9/join"
    assert len(rows["mixed_9/join"].split()) == 2 + 6 and "mixed_8/conv" not in rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda nodes: setattr(nodes["mixed_10/tower_2/pool"], "op", "AvgPool"), "mixed_10/tower_2/pool is mean 3x3/1"),
        (lambda nodes: nodes["mixed/join"].inputs.reverse(), "mixed/join"),
        (lambda nodes: nodes["mixed_3/join"].inputs.insert(1, nodes["mixed_3/join"].inputs.pop(2)), "mixed_3/join"),
    ],
)
def test_another_graph_is_named_by_its_first_layer_that_differs(change, reason):
    nodes = read_graph(GRAPH)
    change(nodes)
    with pytest.raises(GraphFileError, match=reason):
        check_topology(GraphNetwork(nodes, INPUT, (POOL, SPATIAL)), "other.pb")


def test_the_scale_is_used_where_the_graph_says_so():
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 255
    outputs = []
    for flag in (0, 1):
        nodes = read_graph(GRAPH)
        norm = nodes["conv/batchnorm"]
        norm.attributes["scale_after_normalization"] = memoryview(bytes([0x28, flag]))  # AttrValue.b
        width = len(nodes["conv/batchnorm/gamma"].tensor())
        gamma = np.linspace(0.5, 2, width, dtype=np.float32)
        nodes["conv/batchnorm/gamma"] = Constant("conv/batchnorm/gamma", gamma)
        outputs.append(graph_network(nodes, "conv")(images)["conv"])
        mean, variance, beta, weight = (
            torch.from_numpy(nodes[name].tensor().copy()).double()
            for name in ("conv/batchnorm/moving_mean", "conv/batchnorm/moving_variance", "conv/batchnorm/beta",
                         "conv/conv2d_params")
        )  # fmt: skip
        resized = ResizeBilinearTF1(299, 299)(images)
        x = torch.nn.functional.conv2d((resized - 128).double() / 128, weight.permute(3, 2, 0, 1), stride=2)
        x = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 0.001).sqrt()
        x = x * torch.from_numpy(gamma).view(-1, 1, 1) if flag else x
        torch.testing.assert_close(outputs[-1].double(), (x + beta.view(-1, 1, 1)).relu(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*outputs)


class Constant:
    """A node with a value of its own."""

    op = "Const"

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.value, self.inputs = name, value, []

    def tensor(self) -> np.ndarray:
        return self.value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda n: setattr(n["conv_1"], "op", "Elu"), "conv_1 is a Elu, which the evaluator's"),
        (lambda n: n.pop("conv"), "the graph has no node conv"),
        (lambda n: n["Sub"].inputs.__setitem__(0, "conv_1"), "goes in a circle"),
        (lambda n: n["conv/control_dependency"].inputs.clear(), "lacks input 0 of node conv/control_dependency"),
        (lambda n: n["conv/control_dependency"].inputs.__setitem__(0, "conv/control_dependency"), "lacks input"),
        (lambda n: setattr(n["conv/batchnorm"], "op", "Relu"), "expected a BatchNormWithGlobalNormalization"),
        (lambda n: n.__setitem__("Sub/y", Constant("Sub/y", np.zeros(3))), "expected one number"),
        (lambda n: n.__setitem__("conv/batchnorm/beta", Constant("b", np.zeros(5))), "shapes that do not fit"),
        (lambda n: n["ResizeBilinear"].attributes.update(align_corners=memoryview(b"\x28\x01")), "in another way"),
        (lambda n: n["conv/Conv2D"].attributes.update(padding=memoryview(b"\x12\x04FULL")), "padding FULL"),
        (lambda n: n["conv/Conv2D"].attributes.update(padding=memoryview(b"\x12\x04SAME")), "with stride 2"),
    ],
)
def test_graphs_that_are_another_network(change, reason):
    nodes = read_graph(GRAPH)
    change(nodes)
    with pytest.raises(GraphFileError, match=reason):
        graph_network(nodes)
