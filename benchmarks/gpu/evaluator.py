"""The evaluator: the Frechet distance on both devices, and its Inception network in both layouts and with TF32."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from evaluations.inception import POOL, Inception, exact_float32
from evaluations.inception_weights import find_local
from evaluations.metrics import FeatureStatistics, Gaussian, frechet_distance_between
from utils.precision import allow_tf32

_DISTANCE_S = 8.0  # what the distance may take on a CPU
_NETWORK_S = 6.0  # what the network may take to be made and timed once
_LAYOUT_S = 3.0  # what a layout of the network may take


def run(context: Context) -> None:
    """The distance, then the network, whose other layouts come last."""
    allow_tf32()
    with context.attempt("frechet distance"):
        distances(context)
    with context.attempt("inception"):
        network_speeds(context)


def network_speeds(context: Context) -> None:
    """Images per second of the network as the evaluator runs it, and of other layouts and arithmetic."""
    if not context.has_time("inception, as the evaluator", _NETWORK_S):
        return
    network = _network(context)
    batch, edge = (128, 256) if not context.tiny else (2, 32)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, edge, edge, 3), dtype=torch.uint8, generator=generator).to(context.device)
    expected = network(images)["pool"]
    ms = context.median_ms(lambda: network(images), repeats=5, warm_up=1)
    context.record("inception, as the evaluator", batch=batch, images_per_s=1e3 * batch / ms, weights=network.label)
    for layout in ("channels last", "contiguous"):
        for tf32 in (False, True):
            if context.has_time("inception", _LAYOUT_S, layout=layout, tf32=tf32):
                _layout_speed(context, network, images, expected, layout, tf32)


@torch.inference_mode()
def _layout_speed(
    context: Context, network: Inception, images: Tensor, expected: Tensor, layout: str, tf32: bool
) -> None:
    """Images per second of the network alone, and how far its features are from `expected`, those of the evaluator."""
    memory_format = torch.channels_last if layout == "channels last" else torch.contiguous_format
    network.network.to(memory_format=memory_format)
    inputs = images.permute(0, 3, 1, 2).float().contiguous(memory_format=memory_format)
    with nullcontext() if tf32 else exact_float32():
        found = network.network(inputs)[POOL].flatten(1)
        ms = context.median_ms(lambda: network.network(inputs), repeats=5, warm_up=1)
    difference = ((found - expected).norm() / expected.norm()).item()
    context.record("inception", layout=layout, tf32=tf32, batch=len(images), images_per_s=1e3 * len(images) / ms,
                   relative_difference=difference)  # fmt: skip
    if not tf32:
        context.check(f"inception, {layout}: features", difference < 1e-4, relative_difference=difference)


def _network(context: Context) -> Inception:
    """The published network where its file is, else one of the same layers with random weights."""
    path = find_local(None)
    if path is not None and not context.tiny:
        return Inception(path, context.device)
    from benchmarks.evaluation import WIDTHS, write_graph  # needs tensorboard and scipy

    widths = WIDTHS if not context.tiny else " ".join(str(max(int(width) // 16, 7)) for width in WIDTHS.split())
    with tempfile.TemporaryDirectory() as folder:
        write_graph(Path(folder, "graph.pb"), widths)
        return Inception(Path(folder, "graph.pb"), context.device)


def distances(context: Context) -> None:
    """Seconds of both halves of the distance on each device, and that they agree."""
    rows, width = (4096, 2048) if not context.tiny else (96, 32)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    first, second = (torch.randn(rows, width, generator=generator) @ mix + shift for shift in (0.0, 0.1))
    devices = [context.device] if context.device.type == "cpu" else [context.device, torch.device("cpu")]
    found = {}
    for device in devices:
        if context.has_time("frechet distance", _DISTANCE_S, device=device.type):
            found[device.type] = _distance(context, first.to(device), second.to(device))
    compare_distances(context, found, [device.type for device in devices])


def compare_distances(context: Context, found: Mapping[str, float], devices: Sequence[str]) -> None:
    """Check that the distances `found` on all `devices` are equal; left out where one was not measured."""
    name, missing = "frechet distance: equal on all devices", [device for device in devices if device not in found]
    if missing:
        context.record(name, **found, skipped=f"not measured on {', '.join(missing)}")
        return
    first = found[devices[0]]
    equal = all(abs(value - first) <= 1e-5 * max(first, 1.0) for value in found.values())
    context.check(name, equal, **found)


def _distance(context: Context, first: Tensor, second: Tensor) -> float:
    """The distance of two sets of features (N, D) float32; records its seconds by parts."""
    if first.device.type == "cuda":
        torch.linalg.eigvalsh(torch.eye(64, device=first.device, dtype=torch.float64))  # loads the library
    began = context.synchronize()
    statistics = [_statistics(features) for features in (first, second)]
    summed = context.synchronize()
    gaussians = [Gaussian.of(one.mean, one.covariance) for one in statistics]
    rooted = context.synchronize()
    value = frechet_distance_between(*gaussians)
    ended = time.perf_counter()
    context.record("frechet distance", device=first.device.type, width=first.shape[1], rows=len(first),
                   statistics_seconds=summed - began, square_roots_seconds=rooted - summed,
                   trace_seconds=ended - rooted, distance=value)  # fmt: skip
    return value


def _statistics(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics()
    statistics.update(features)
    return statistics
