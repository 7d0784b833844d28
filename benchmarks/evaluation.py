"""How fast pictures are evaluated: the Inception network in PyTorch and in TensorFlow, and the Frechet distance.

    python -m benchmarks.evaluation            both networks in turn, 3 rounds of 64 pictures each; then the distance
    python -m benchmarks.evaluation --rounds 5 --images 128 --num-threads 2
    python -m benchmarks.evaluation --device cuda --images 512

The network has the published graph's layers and widths with random weights, written to a temporary file that both
backends read. Where TensorFlow is not installed, PyTorch is measured alone; on a GPU in both memory layouts. The
distance is that of two sets of 2048 features: ours, and with scipy.linalg.sqrtm. The last line is one JSON object;
`speedup` is PyTorch over TensorFlow, images per second, the median of the rounds (null without TensorFlow).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # started by file path: the repository root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import scipy.linalg
import torch
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef

from evaluations.c2i.evaluation import load_network
from evaluations.features import FeatureNetwork
from evaluations.inception import CLASSIFIER, INPUT, POOL, TOPOLOGY, Inception
from evaluations.metrics import FeatureStatistics, frechet_distance_between
from utils.args import make_parser
from utils.errors import run

FLOAT, INT32 = 1, 3  # TensorFlow's numbers of data types
# Output channels of the 94 convolutions of the published graph, in the order of the topology file.
WIDTHS = """
    32 32 64 80 192 64 48 64 64 96 96 32 64 48 64 64 96 96 64 64 48 64 64 96 96 64 384 64 96 96 192 128 128 192 128 128
    128 128 192 192 192 160 160 192 160 160 160 160 192 192 192 160 160 192 160 160 160 160 192 192 192 192 192 192 192
    192 192 192 192 192 192 320 192 192 192 192 320 384 384 384 448 384 384 384 192 320 384 384 384 448 384 384 384 192
"""
CLASSES, FEATURES = 1008, 2048


class GraphWriter:
    """Writes the published graph with random weights; channels of each layer are kept by name."""

    def __init__(self, widths: list[int], classes: int = CLASSES) -> None:
        self.graph = GraphDef()
        self.channels = {INPUT: 3}
        self._widths = iter(widths)
        self._random = np.random.default_rng(0)
        self._node(INPUT, "Placeholder").attr["dtype"].type = FLOAT
        for line in TOPOLOGY.read_text().splitlines():
            name, layer = line.split(": ")
            kind, inputs = layer.split(" of ")
            self._layer(name, kind.split(), inputs.split())
        self._constant("softmax/weights", self._normal(self.channels[POOL], classes) / 100)
        self._node("pool_3/_reshape", "Reshape", [POOL, self._constant("pool_3/shape", [-1, self.channels[POOL]])])
        self._node(CLASSIFIER, "MatMul", ["pool_3/_reshape", "softmax/weights"])

    def _layer(self, name: str, kind: list[str], inputs: list[str]) -> None:
        self.channels[name] = sum(self.channels[used] for used in inputs)
        if kind[0] == "conv":
            self._convolution(name, *kind[1:], inputs[0])
        elif kind[0] in ("max", "mean"):
            guarded = self._guard(name, inputs[0])
            node = self._node(name, "MaxPool" if kind[0] == "max" else "AvgPool", [guarded])
            _window(node, kind[1], kind[2])
            height, width = map(int, kind[1].split("/")[0].split("x"))
            node.attr["ksize"].list.i.extend([1, height, width, 1])
        elif kind[0] == "join":
            axis = self._constant(f"{name}/concat_dim", 3)
            self._node(name, "Concat", [axis, *inputs]).attr["N"].i = len(inputs)
        elif kind[0] == "resize":
            height, width = map(int, kind[1].split("x"))
            self._node(name, "ResizeBilinear", [inputs[0], self._constant(f"{name}/size", [height, width])])
        else:
            self._node(name, kind[0], [inputs[0], self._constant(f"{name}/y", float(kind[1]))])

    def _convolution(self, name: str, window: str, padding: str, source: str) -> None:
        height, width = map(int, window.split("/")[0].split("x"))
        inputs, outputs = self.channels[source], next(self._widths)
        self.channels[name] = outputs
        scale = (2 / (height * width * inputs)) ** 0.5
        weights = self._constant(f"{name}/conv2d_params", self._normal(height, width, inputs, outputs) * scale)
        _window(self._node(f"{name}/Conv2D", "Conv2D", [source, weights]), window, padding)
        moments = {"moving_mean": 0.0, "moving_variance": 1.0, "beta": 0.0, "gamma": 1.0}
        parts = [self._constant(f"{name}/batchnorm/{key}", np.full(outputs, v)) for key, v in moments.items()]
        norm = self._node(f"{name}/batchnorm", "BatchNormWithGlobalNormalization", [f"{name}/Conv2D", *parts])
        norm.attr["variance_epsilon"].f = 0.001
        norm.attr["scale_after_normalization"].b = False
        self._node(name, "Relu", [self._guard(name, f"{name}/batchnorm")])

    def _guard(self, name: str, source: str) -> str:
        self._node(f"{name}/CheckNumerics", "CheckNumerics", [source]).attr["message"].s = b"not finite"
        return self._node(f"{name}/control_dependency", "Identity", [source, f"^{name}/CheckNumerics"]).name

    def _node(self, name: str, op: str, inputs: list[str] | tuple = ()) -> NodeDef:
        node = self.graph.node.add(name=name, op=op, input=inputs)
        if op not in ("Const", "Placeholder"):
            node.attr["T"].type = FLOAT
        return node

    def _constant(self, name: str, value: Any) -> str:
        array = np.asarray(value)
        array = array.astype("<i4" if array.dtype.kind == "i" else "<f4")
        node = self._node(name, "Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = node.attr["dtype"].type = INT32 if array.dtype.kind == "i" else FLOAT
        tensor.tensor_content = array.tobytes()
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        return name

    def _normal(self, *shape: int) -> np.ndarray:
        return self._random.standard_normal(shape, dtype=np.float32)


def _window(node: NodeDef, window: str, padding: str) -> None:
    stride = int(window.split("/")[1])
    node.attr["strides"].list.i.extend([1, stride, stride, 1])
    node.attr["padding"].s = padding.encode()


def write_graph(path: Path, widths: str = WIDTHS) -> None:
    """Write a graph with the published layers and random weights (96 MB in full width)."""
    path.write_bytes(GraphWriter([int(width) for width in widths.split()]).graph.SerializeToString())


def make_networks(graph: Path, device: torch.device) -> dict[str, FeatureNetwork]:
    """What is compared: the backends that are installed, and on a GPU PyTorch with channels first too."""
    networks = {"torch": load_network("torch", graph, device)}
    if device.type == "cuda":
        networks["torch_channels_first"] = Inception(graph, device, torch.contiguous_format)
    if importlib.util.find_spec("tensorflow"):
        networks["tensorflow"] = load_network("tensorflow", graph, device)
    else:
        print("TensorFlow is not installed: PyTorch is measured alone", flush=True)
    return networks


def wait(device: torch.device) -> float:
    """The time when everything asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def images_per_second(network: FeatureNetwork, pictures: torch.Tensor, device: torch.device) -> float:
    """Images per second of one call."""
    started = wait(device)
    network(pictures)
    return len(pictures) / (wait(device) - started)


def measure_networks(
    networks: Mapping[str, FeatureNetwork], images: int, rounds: int, size: int, device: torch.device
) -> dict[str, Any]:
    """Speed of each network in alternating rounds, and how far the features of the first and the last differ.

    A call before them does not count: of eight images on a CPU, of all on a GPU, which chooses kernels by size.
    """
    pictures = torch.randint(256, (images, size, size, 3), dtype=torch.uint8)
    first = images if device.type == "cuda" else 8
    seen = [network(pictures[:first])["pool"].cpu() for network in networks.values()]
    speeds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, network in networks.items():
            speeds[name].append(images_per_second(network, pictures, device))
            print(f"{name:10} {speeds[name][-1]:8.2f} images/s", flush=True)
    medians = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
    difference = ((seen[0] - seen[-1]).abs().max() / seen[-1].abs().max()).item()
    return {**medians, "largest_difference": float(f"{difference:.2g}")}


def measure_distance(device: torch.device, rows: int = 3000, width: int = FEATURES) -> dict[str, float]:
    """Seconds of the Frechet distance of two sets of random features, ours and with SciPy's matrix square root."""
    sets = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        mixed = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
        sets.append(FeatureStatistics())
        sets[-1].update((mixed / width**0.5).to(device))
    started = wait(device)
    ours = frechet_distance_between(sets[0].gaussian(), sets[1].gaussian())
    between = wait(device)
    root = scipy.linalg.sqrtm((sets[0].covariance @ sets[1].covariance).cpu().numpy())
    trace = sets[0].covariance.trace() + sets[1].covariance.trace() - 2 * float(np.trace(root).real)
    scipys = float((sets[0].mean - sets[1].mean).square().sum() + trace)
    ended = time.perf_counter()
    result = {"seconds": round(between - started, 2), "scipy_seconds": round(ended - between, 2)}
    return {**result, "relative_difference": float(f"{abs(ours - scipys) / scipys:.2g}")}


def parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    flags = make_parser(__doc__)
    flags.add_argument("--images", type=int, default=64, help="pictures of a round, in one batch")
    flags.add_argument("--rounds", type=int, default=3, help="how often each backend runs")
    flags.add_argument("--size", type=int, default=256, help="edge of the pictures")
    flags.add_argument(
        "--num-threads", type=int, help="CPU threads of either backend; the default is 1, with a GPU torch's choice"
    )
    flags.add_argument("--device", default="cpu", help="cpu or cuda")
    return flags


def main() -> None:
    """Run the benchmark and print its numbers."""
    args = parser().parse_args()
    device = torch.device(args.device)
    threads = args.num_threads or (1 if device.type == "cpu" else None)
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "graph.pb")
        write_graph(graph)
        found = measure_networks(make_networks(graph, device), args.images, args.rounds, args.size, device)
    result = {"images": args.images, "size": args.size, "threads": torch.get_num_threads(), "device": args.device}
    speedup = round(found["torch"] / found["tensorflow"], 2) if "tensorflow" in found else None
    print(json.dumps({**result, **found, "speedup": speedup, "distance": measure_distance(device)}))


if __name__ == "__main__":
    run(main)
