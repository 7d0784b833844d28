"""The Inception network of the established evaluator, in PyTorch, read from its frozen TensorFlow graph.

The network is what the graph says: convolutions, pools and joins are taken from the file, its guards (checks for NaN)
are dropped, and batch normalisation is folded into the convolutions in float64. The graph's own preprocessing is part
of it: TensorFlow-1 bilinear resizing to 299 x 299 without half-pixel centres, and scaling to [-1, 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.features import check_pictures
from evaluations.graph_file import GraphFileError, Node, read_graph
from evaluations.inception_weights import identify
from evaluations.metrics import class_probabilities

INPUT = "ExpandDims"  # what the pictures, float32 (N, H, W, 3) in 0..255, take the place of
POOL, SPATIAL, CLASSIFIER = "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
SPATIAL_CHANNELS = 7  # of the spatial features that sFID looks at
TOPOLOGY = Path(__file__).with_name("inception_topology.txt")
_GUARDS = ("Identity", "CheckNumerics")
_SUBSTANCE = ("Sub", "Mul", "ResizeBilinear", "Relu", "MaxPool", "AvgPool", "Concat", "ConcatV2")


class Inception:
    """Pictures to features: uint8 (N, H, W, 3), RGB, any size -> pool (N, 2048), spatial (N, 2023), probabilities.

    `path` is the frozen graph. `comparable` is true for the published file alone (known by its hash): the Frechet
    distance of any other weights is no FID. Such a file must have the published layers, in any width. `memory_format`
    is that of weights and feature maps; None: channels last on a CPU, and first on a GPU, which is a fifth faster so in
    float32 without TF32 (docs/results.md).

    Raises:
        FileNotFoundError, GraphFileError: when `path` cannot be read or is another network.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format | None = None,
    ) -> None:
        weights = identify(path)
        nodes = read_graph(path)
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.memory_format = memory_format or (torch.channels_last if on_cpu else torch.contiguous_format)
        self.comparable, self.label = weights.published, f"{weights.name}, torch"
        self.network = GraphNetwork(nodes, INPUT, (POOL, SPATIAL))
        if not weights.published:
            check_topology(self.network, path)
        self.network.to(self.device, memory_format=self.memory_format).eval()
        self.classifier = _tensor(nodes[_source(nodes, CLASSIFIER, 1)]).to(self.device)  # its bias is not used

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        check_pictures(pictures)
        with exact_float32():
            images = pictures.to(self.device).permute(0, 3, 1, 2)
            found = self.network(images.to(torch.float32, memory_format=self.memory_format))
        pool = found[POOL].flatten(1)
        spatial = found[SPATIAL][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "probabilities": class_probabilities(pool, self.classifier)}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions without TF32, which the numbers of a published metric should not depend on."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


class GraphNetwork(nn.Module):
    """The part of a graph that leads from the node `source` to the nodes `targets`, as a PyTorch module.

    `rows` says for each layer what it is: the operation and its inputs.
    """

    def __init__(self, nodes: dict[str, Node], source: str, targets: tuple[str, ...]) -> None:
        super().__init__()
        self.source, self.targets = source, targets
        self.layers = nn.ModuleDict()
        self.inputs: dict[str, tuple[str, ...]] = {}
        for name in _order(nodes, source, targets):
            layer, inputs = _layer(nodes, nodes[name])
            self.layers[name], self.inputs[name] = layer, inputs
        users = {used: name for name, inputs in self.inputs.items() for used in inputs}
        self._done_after = {name: [used for used, last in users.items() if last == name] for name in self.layers}

    @property
    def rows(self) -> dict[str, str]:
        return {name: f"{layer.extra_repr()} of {' '.join(self.inputs[name])}" for name, layer in self.layers.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) to the targets, (N, C, H, W) each."""
        values = {self.source: images}
        for name, layer in self.layers.items():
            values[name] = layer(*(values[used] for used in self.inputs[name]))
            for used in self._done_after[name]:
                if used not in self.targets:
                    del values[used]
        return {name: values[name] for name in self.targets}


def check_topology(network: GraphNetwork, path: str | Path) -> None:
    """Compare a network with the layers of the published graph.

    Raises:
        GraphFileError: naming the first layer that differs.
    """
    wanted = dict(line.split(": ", 1) for line in TOPOLOGY.read_text().splitlines())
    for name, row in network.rows.items():
        if wanted.get(name) != row:
            raise GraphFileError(
                f"{path} is not the evaluator's Inception graph: its layer {name} is {row}, expected "
                f"{wanted.get(name, 'no such layer')}"
            )


def _order(nodes: dict[str, Node], source: str, targets: tuple[str, ...]) -> list[str]:
    """The nodes to compute, each after its inputs."""
    order: list[str] = []
    state: dict[str, bool] = {source: True}  # False: on the way, True: done
    stack = list(reversed(targets))
    while stack:
        name = stack[-1]
        if state.get(name):
            stack.pop()
            continue
        if name not in nodes:
            raise GraphFileError(f"the graph has no node {name}")
        waiting = [used for used in _data_inputs(nodes, nodes[name]) if not state.get(used)]
        if not waiting:
            state[stack.pop()] = True
            order.append(name)
        elif name in state:
            raise GraphFileError(f"the graph goes in a circle at {name}")
        else:
            state[name] = False
            stack += reversed(waiting)
    return order


def _data_inputs(nodes: dict[str, Node], node: Node) -> list[str]:
    """The layers whose output a layer takes: constants and guards left out."""
    if node.op not in _SUBSTANCE:
        raise GraphFileError(f"node {node.name} is a {node.op}, which the evaluator's Inception graph does not have")
    if node.op == "Relu":
        return [_source(nodes, _of_kind(nodes, _norm(nodes, node), "Conv2D").name, 0)]
    numbers = {"Concat": range(1, len(node.inputs)), "ConcatV2": range(len(node.inputs) - 1)}.get(node.op, range(1))
    return [_source(nodes, node.name, i) for i in numbers]


def _source(nodes: dict[str, Node], name: str, i: int) -> str:
    """The node that input `i` of node `name` comes from, past guards."""
    seen = set()
    while True:
        if name not in nodes or i >= len(nodes[name].inputs) or name in seen:
            raise GraphFileError(f"the graph lacks input {i} of node {name}")
        seen.add(name)
        found = nodes[name].inputs[i].split(":")[0]
        if found not in nodes or nodes[found].op not in _GUARDS:
            return found
        name, i = found, 0


def _of_kind(nodes: dict[str, Node], node: Node, op: str) -> Node:
    found = nodes.get(_source(nodes, node.name, 0))
    if found is None or found.op != op:
        raise GraphFileError(f"node {node.name} follows a {found.op if found else 'missing node'}, expected a {op}")
    return found


def _norm(nodes: dict[str, Node], relu: Node) -> Node:
    return _of_kind(nodes, relu, "BatchNormWithGlobalNormalization")


def _constants(nodes: dict[str, Node], node: Node, *numbers: int) -> list[np.ndarray]:
    found = [_source(nodes, node.name, i) for i in numbers]
    for name in found:
        if name not in nodes:
            raise GraphFileError(f"the graph has no node {name}, an input of {node.name}")
    return [nodes[name].tensor() for name in found]


def _tensor(node: Node) -> Tensor:
    return torch.from_numpy(node.tensor().astype(np.float32))


def _layer(nodes: dict[str, Node], node: Node) -> tuple[nn.Module, tuple[str, ...]]:
    inputs = tuple(_data_inputs(nodes, node))
    if node.op == "Relu":
        return _convolution(nodes, node), inputs
    if node.op in ("MaxPool", "AvgPool"):
        kernel, stride, padding = _window(node, node.integers("ksize")[1:3])
        return Pool(node.op == "MaxPool", kernel, stride, padding), inputs
    if node.op in ("Concat", "ConcatV2"):
        (axis,) = _constants(nodes, node, 0 if node.op == "Concat" else len(node.inputs) - 1)
        if axis.size != 1 or int(axis.item()) != 3:
            raise GraphFileError(f"node {node.name} joins along axis {axis.tolist()}, expected channels (3)")
        return Join(), inputs
    (value,) = _constants(nodes, node, 1)
    if node.op == "ResizeBilinear":
        if node.flag("align_corners") or node.flag("half_pixel_centers") or value.shape != (2,):
            raise GraphFileError(f"node {node.name} resizes in another way than the evaluator's Inception graph")
        return ResizeBilinearTF1(int(value[0]), int(value[1])), inputs
    if value.size != 1:
        raise GraphFileError(f"node {node.name} has a constant of shape {value.shape}, expected one number")
    return Scale(node.op, float(value.item())), inputs


def _convolution(nodes: dict[str, Node], relu: Node) -> Convolution:
    """Convolution, batch normalisation and ReLU as one layer; folded in float64."""
    norm = _norm(nodes, relu)
    convolution = _of_kind(nodes, norm, "Conv2D")
    (weight,) = _constants(nodes, convolution, 1)
    mean, variance, beta, gamma = (v.astype(np.float64) for v in _constants(nodes, norm, 1, 2, 3, 4))
    if weight.ndim != 4 or any(v.shape != weight.shape[3:] for v in (mean, variance, beta, gamma)):
        raise GraphFileError(f"the weights of {relu.name} have shapes that do not fit: {weight.shape}, {mean.shape}")
    scale = 1 / np.sqrt(variance + norm.number("variance_epsilon"))
    if norm.flag("scale_after_normalization"):
        scale = scale * gamma
    kernel, stride, padding = _window(convolution, weight.shape[:2])
    folded = (weight.astype(np.float64) * scale).transpose(3, 2, 0, 1).astype(np.float32)
    return Convolution(torch.from_numpy(folded), torch.from_numpy((beta - mean * scale).astype(np.float32)),
                       kernel, stride, padding)  # fmt: skip


def _window(node: Node, kernel: tuple[int, ...]) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """Kernel, stride and padding of a convolution or pool; SAME padding is symmetric here."""
    strides, padding = node.integers("strides"), node.text("padding")
    height, width = kernel
    same = padding == "SAME" and (height, width) != (1, 1)
    plain = len(strides) == 4 and strides[0] == strides[3] == 1 and strides[1] == strides[2] >= 1
    if not plain or padding not in ("SAME", "VALID") or node.text("data_format", "NHWC") != "NHWC":
        raise GraphFileError(f"node {node.name} has strides {strides} and padding {padding}, which are not supported")
    if same and (strides[1] != 1 or height % 2 == 0 or width % 2 == 0):
        raise GraphFileError(f"node {node.name} pads a {height}x{width} window with stride {strides[1]}")
    return (height, width), strides[1], (height // 2, width // 2) if same else (0, 0)


class _Windowed(nn.Module):
    def __init__(self, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def extra_repr(self) -> str:
        padded = "SAME" if any(self.padding) else "VALID"
        return f"{self.kernel[0]}x{self.kernel[1]}/{self.stride} {padded}"


class Convolution(_Windowed):
    """Convolution with bias, then ReLU."""

    def __init__(self, weight: Tensor, bias: Tensor, kernel: tuple[int, int], stride: int, padding: tuple[int, int]):
        super().__init__(kernel, stride, padding)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()

    def extra_repr(self) -> str:
        return f"conv {super().extra_repr()}"


class Pool(_Windowed):
    """Maximum or mean over a window; cells outside the image count for neither."""

    def __init__(self, maximum: bool, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        super().__init__(kernel, stride, padding)
        self.maximum = maximum

    def forward(self, x: Tensor) -> Tensor:
        if self.maximum:
            return F.max_pool2d(x, self.kernel, self.stride, self.padding)
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, count_include_pad=False)

    def extra_repr(self) -> str:
        return f"{'max' if self.maximum else 'mean'} {super().extra_repr()}"


class Join(nn.Module):
    """Channels side by side."""

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        return "join"


class Scale(nn.Module):
    """x - value or x * value."""

    def __init__(self, op: str, value: float) -> None:
        super().__init__()
        self.op, self.value = op, value

    def forward(self, x: Tensor) -> Tensor:
        return x - self.value if self.op == "Sub" else x * self.value

    def extra_repr(self) -> str:
        return f"{self.op} {self.value:g}"


class ResizeBilinearTF1(nn.Module):
    """Bilinear resizing as TensorFlow 1 does it by default, bit by bit: corner-aligned grid, no antialiasing."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32 to (N, C, height, width)."""
        return _stretch(_stretch(x, self.width, dim=3), self.height, dim=2)

    def extra_repr(self) -> str:
        return f"resize {self.height}x{self.width}"


def _stretch(x: Tensor, size: int, dim: int) -> Tensor:
    """Linear interpolation along `dim`: source coordinate = target * (in / out) in float32, without half pixels."""
    if x.shape[dim] == size:
        return x
    # the operations one by one: a fused one would round differently
    at = torch.arange(size, device=x.device, dtype=torch.float32) * np.float32(x.shape[dim] / size).item()
    low = at.floor().long()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    shape = [1] * x.ndim
    shape[dim] = size
    a, b = x.index_select(dim, low), x.index_select(dim, high)
    return a + (b - a) * (at - low).view(shape)
