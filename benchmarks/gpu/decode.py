"""How fast tokens are decoded: every size against the floor of its memory traffic, and one step by kernel.

A step reads all weights once and the keys and values so far; at the measured copy bandwidth that is its floor. Random
weights: the speed does not depend on them. Whole images are generated, so positions are averaged over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autoregressive.engine.build import make_engine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.noise import ImageNoise
from benchmarks.gpu.context import Context
from benchmarks.gpu.probe import ceilings
from benchmarks.gpu.profiling import profile, short
from benchmarks.sampling import step_cost
from utils.flops import hardware_of

_OPTIONS = {"cfg_scale": 2.0, "top_k": 2000}

# size, edge in pixels, images at once, engine, quantization; what tells most comes first
_CASES = (
    ("GPT-L", 384, 8, "triton", "none"),
    ("GPT-L", 384, 256, "triton", "none"),
    ("GPT-L", 384, 1, "triton", "none"),
    ("GPT-3B", 384, 8, "triton", "none"),
    ("GPT-XL", 384, 8, "triton", "none"),
    ("GPT-XXL", 384, 8, "triton", "none"),
    ("GPT-XL", 384, 256, "triton", "none"),
    ("GPT-B", 256, 256, "triton", "none"),
    ("GPT-L", 256, 256, "triton", "none"),
    ("GPT-3B", 384, 8, "triton", "int8"),
    ("GPT-L", 384, 8, "triton", "int8"),
    ("GPT-L", 384, 8, "compiled", "none"),
    ("GPT-L", 384, 256, "compiled", "none"),
    ("GPT-L", 384, 8, "eager", "none"),
)
_TINY = (("GPT-XS", 64, 2, "compiled", "none"), ("GPT-XS", 64, 2, "eager", "none"))


def run(context: Context) -> None:
    """Time every case, and profile steps of the first model."""
    models: dict[tuple[str, int], Transformer] = {}
    for size, edge, batch, engine, quantize in _TINY if context.tiny else _CASES:
        if not context.has_time("step", 12, case=f"{size} {edge} px x{batch} {engine} {quantize}"):
            continue
        if (size, edge) not in models:
            models.clear()
            context.free()
            models[size, edge] = random_gpt(size, edge, context.device)
        with context.attempt(f"{size}, {edge} px, {batch} images, {engine}, {quantize}"):
            measure(context, models[size, edge], (size, edge, batch, engine, quantize))


def random_gpt(size: str, edge: int, device: torch.device) -> Transformer:
    """A bfloat16 GPT with random weights, its head included, made on `device`."""
    torch.manual_seed(0)
    with device:
        model = GPT_models[size](block_size=(edge // 16) ** 2)
        nn.init.normal_(model.output.weight, std=0.02)
    return model.bfloat16().eval()


def measure(context: Context, model: Transformer, case: tuple[str, int, int, str, str]) -> None:
    """Milliseconds a step of one case, beside its floors; the first generation prepares and does not count."""
    size, edge, batch, name, quantize = case
    context.reset_peak()
    started = context.synchronize()
    engine = make_engine(model, name, quantize)
    engine.warm_up(batch, **_OPTIONS)
    ready = context.synchronize() - started
    labels = torch.arange(batch, device=context.device) * 37 % 1000
    seconds = [generation_seconds(context, engine, labels) for _ in range(2 if batch <= 8 and name != "eager" else 1)]
    steps = model.block_size
    ms = min(seconds) / steps * 1e3
    cost = step_cost(model, 2 * batch, 1 if quantize == "int8" else 2)
    copy_gb_per_s, product_tflops = ceilings(context)
    floor = max(cost["bytes"] / copy_gb_per_s / 1e6, cost["flops"] / product_tflops / 1e9)
    sheet = hardware_of(torch.cuda.get_device_name()) if context.device.type == "cuda" else None
    context.record(
        "step", size=size, pixels=edge, images=batch, engine=engine.name, quantize=quantize, ms=round(ms, 4),
        floor_ms=round(floor, 4), times_floor=round(ms / floor, 2),
        data_sheet_floor_ms=sheet and round(cost["bytes"] / sheet.bytes_per_second * 1e3, 4),
        tokens_per_s=round(batch / ms * 1e3), images_per_s=round(batch / min(seconds), 2), ready_s=round(ready, 1),
        peak_gb=round(context.peak_memory_gb(), 1),
    )  # fmt: skip
    if context.device.type == "cuda" and batch in (8, 256) and name != "eager" and size in ("GPT-L", "GPT-3B"):
        profile_step(context, engine, labels, f"{size} x{batch} {engine.name} {quantize}")


def generation_seconds(context: Context, engine: Engine, labels: torch.Tensor) -> float:
    """Seconds of one generation of whole images, the prefill included."""
    noise = ImageNoise(range(len(labels)), labels.device)
    started = context.synchronize()
    generate(engine, labels, engine.block_size, generators=noise, **_OPTIONS)
    return context.synchronize() - started


def profile_step(context: Context, engine: Engine, labels: torch.Tensor, name: str) -> None:
    """Kernels of the first 16 steps of an image: calls and microseconds a step, and the share of time without any."""
    steps = 16
    options: dict[str, Any] = {"generators": ImageNoise(range(len(labels)), labels.device), **_OPTIONS}
    generate(engine, labels, steps + 1, **{**options, "generators": ImageNoise(range(len(labels)), labels.device)})
    found = profile(context, lambda: generate(engine, labels, steps + 1, **options))
    kernels = [
        f"{1e3 * ms / steps:.1f} us, {calls / steps:.1f} x {short(kernel, 50)}"
        for kernel, (calls, ms) in list(found.totals.items())[:12]
    ]
    busy_us = 1e3 * sum(ms for _, ms in found.totals.values()) / steps
    context.record(
        "profile", case=name, busy_us_per_step=round(busy_us, 1), idle_share=found.idle_share, kernels=kernels
    )
