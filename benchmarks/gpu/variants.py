"""Decode steps under other launch parameters than the kernels' own: what a new card, or a new Triton, would choose.

The kernels' checks say what is right; this says what is fast in the chain of a whole step, where a kernel's start and
end count. A step is replayed at the first, a middle and the last position of an image of 384 pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from autoregressive.engine.static import StaticEngine
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.noise import ImageNoise
from benchmarks.gpu.context import Context
from benchmarks.gpu.decode import random_gpt
from benchmarks.gpu.kernel_times import TINY
from benchmarks.gpu.kernels import interpret_on_cpu

_OPTIONS = {"cfg_scale": 2.0, "top_k": 2000}
_POSITIONS = (20, 289, 560)
_REPLAYS = 20

# size, images at once, whether launch parameters of products are tried too (above 64 rows they are cuBLAS's)
_CASES = (("GPT-L", 8, True), ("GPT-3B", 8, True), ("GPT-L", 1, False), ("GPT-L", 256, False), ("GPT-L", 32, True))


def run(context: Context) -> None:
    """Every variant of every case, as long as there is time."""
    interpret_on_cpu(context)
    from autoregressive.engine.kernels import attention, launch, linear

    modules = {"attention": attention, "linear": linear, "launch": launch}
    for size, images, products in _CASES[:1] if context.tiny else _CASES:
        model = Transformer(TINY).bfloat16().eval() if context.tiny else random_gpt(size, 384, context.device)
        found = variants(modules, products)
        for name, change in list(found.items())[-1:] if context.tiny else found.items():
            if context.seconds_left < 5:
                context.record("step", size=size, images=images, variant=name, skipped="no time was left")
                continue
            with context.attempt(f"{size}, {images} images, {name}"), change():
                times = step_milliseconds(context, model, images)
                context.record("step", size=size, images=images, variant=name, **times)
        del model
        context.free()


def variants(modules: dict[str, ModuleType], products: bool) -> dict[str, Callable[[], Any]]:
    """Name -> a context in which kernels are launched so."""
    attention, linear = modules["attention"], modules["linear"]
    dependent = partial(dependent_launches, modules["launch"])
    found: dict[str, Callable[[], Any]] = {"as it is": ExitStack, "dependent launches": dependent}
    for config in attention.CANDIDATES[1:]:
        found[f"attention {tuple(config)}"] = partial(mock.patch.object, attention, "DEFAULT", config)
    if products:
        changes = {
            "block_k 256, 4 stages": {"block_k": 256, "num_stages": 4},
            "4 warps": {"num_warps": 4, "k_splits": 4},
            "16 outputs": {"block_n": 16},
            "2 stages": {"num_stages": 2},
        }
        for name, values in changes.items():
            config = partial(_changed, linear.default_config, values)
            found[f"products {name}"] = partial(mock.patch.object, linear, "default_config", config)
    return found


def _changed(default: Callable[..., Any], values: dict[str, Any], *shape: int, **options: int) -> Any:
    return replace(default(*shape, **options), **values)


@contextmanager
def dependent_launches(launch: ModuleType) -> Iterator[None]:
    """Kernels start while the one before them ends."""
    with mock.patch.dict(os.environ, {"LLAMAGEN_DEPENDENT_LAUNCH": "1"}):
        launch.dependent_launch.cache_clear()
        try:
            yield
        finally:
            launch.dependent_launch.cache_clear()


def step_milliseconds(context: Context, model: torch.nn.Module, images: int) -> dict[str, float]:
    """Milliseconds of a guided step at some positions: replays of the graph that a short generation records."""
    from autoregressive.engine.fused import FusedEngine

    engine: StaticEngine = FusedEngine(model)
    labels = torch.arange(images, device=context.device) * 37 % 1000
    generate(engine, labels, 3, generators=ImageNoise(range(images), context.device), **_OPTIONS)
    (key, step), *_ = engine._steps.items()
    buffers = engine._buffers[key.images]
    positions, count = (_POSITIONS, _REPLAYS) if not context.tiny else ((4,), 1)
    times = {}
    for position in positions:

        def replays(position: int = position) -> None:
            buffers.position.fill_(position - count // 2)
            buffers.index.zero_()
            for _ in range(count):
                step()

        times[f"ms_at_{position}"] = context.median_ms(replays, repeats=3, warm_up=1) / count
    return times
