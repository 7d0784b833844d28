"""How fast tokens are decoded: every size against the floor of its memory traffic, and one step by kernel.

A step reads all weights once and the keys and values so far; at the measured copy bandwidth that is its floor. Random
weights: the speed does not depend on them. Whole images are generated, so positions are averaged over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from utils.flops import block_weights, cache_bytes, decode_flops_per_token, hardware_of, head_weights

_OPTIONS = {"cfg_scale": 2.0, "top_k": 2000}


class Case(NamedTuple):
    """What is timed: images of `edge` pixels, `images` of them at once."""

    size: str
    edge: int
    images: int
    engine: str = "triton"
    quantize: str = "none"
    kv_cache_dtype: str = "auto"

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(str(value) for value in self)


# what tells most comes first
_CASES = (
    Case("GPT-L", 384, 8),
    Case("GPT-L", 384, 256),
    Case("GPT-L", 384, 1),
    Case("GPT-3B", 384, 8),
    Case("GPT-XL", 384, 8),
    Case("GPT-XXL", 384, 8),
    Case("GPT-XL", 384, 256),
    Case("GPT-L", 384, 256, kv_cache_dtype="fp8"),
    Case("GPT-L", 384, 256, kv_cache_dtype="int8"),
    Case("GPT-B", 256, 256),
    Case("GPT-L", 256, 256),
    Case("GPT-3B", 384, 8, quantize="int8"),
    Case("GPT-L", 384, 8, quantize="int8"),
    Case("GPT-L", 384, 8, "compiled"),
    Case("GPT-L", 384, 256, "compiled"),
    Case("GPT-L", 384, 8, "eager"),
)
_TINY = (Case("GPT-XS", 64, 2, "compiled"), Case("GPT-XS", 64, 2, "eager"))


def run(context: Context) -> None:
    """Time every case, and profile steps of the first model."""
    models: dict[tuple[str, int], Transformer] = {}
    for case in _TINY if context.tiny else _CASES:
        if not context.has_time("step", 12, case=case.name):
            continue
        if (case.size, case.edge) not in models:
            models.clear()
            context.free()
            models[case.size, case.edge] = random_gpt(case.size, case.edge, context.device)
        with context.attempt(case.name):
            measure(context, models[case.size, case.edge], case)


def random_gpt(size: str, edge: int, device: torch.device) -> Transformer:
    """A bfloat16 GPT with random weights, its head included, made on `device`."""
    torch.manual_seed(0)
    with device:
        model = GPT_models[size](block_size=(edge // 16) ** 2)
        nn.init.normal_(model.output.weight, std=0.02)
    return model.bfloat16().eval()


def measure(context: Context, model: Transformer, case: Case) -> None:
    """Milliseconds a step of one case, beside its floors; the first generation prepares and does not count."""
    context.reset_peak()
    started = context.synchronize()
    engine = make_engine(model, case.engine, case.quantize, case.kv_cache_dtype)
    engine.warm_up(case.images, **_OPTIONS)
    ready = context.synchronize() - started
    labels = torch.arange(case.images, device=context.device) * 37 % 1000
    repeats = 2 if case.images <= 8 and case.engine != "eager" else 1
    seconds = min(generation_seconds(context, engine, labels) for _ in range(repeats))
    ms = seconds / model.block_size * 1e3
    read = step_bytes(model, case)
    copy_gb_per_s, product_tflops = ceilings(context)
    flops = 2 * case.images * decode_flops_per_token(model.config, 1 + model.block_size // 2)
    floor = max(read / copy_gb_per_s / 1e6, flops / product_tflops / 1e9)
    sheet = hardware_of(torch.cuda.get_device_name()) if context.device.type == "cuda" else None
    context.record(
        "step", **case._asdict(), ms=round(ms, 4), floor_ms=round(floor, 4), times_floor=round(ms / floor, 2),
        data_sheet_floor_ms=sheet and round(read / sheet.bytes_per_second * 1e3, 4),
        tokens_per_s=round(case.images / ms * 1e3), images_per_s=round(case.images / seconds, 2),
        ready_s=round(ready, 1), peak_gb=round(context.peak_memory_gb(), 1),
    )  # fmt: skip
    profiled = case.images in (8, 256) and case.engine != "eager" and case.size in ("GPT-L", "GPT-3B")
    if context.device.type == "cuda" and profiled:
        profile_step(context, engine, labels, case.name)


def step_bytes(model: Transformer, case: Case) -> int:
    """Bytes that a guided step at the average position reads: all matrices once, and the keys and values so far."""
    weights = (block_weights(model.config) + head_weights(model.config)) * (1 if case.quantize == "int8" else 2)
    each = {"bytes_per_value": 2} if case.kv_cache_dtype == "auto" else {"bytes_per_value": 1, "bytes_per_scale": 4}
    return weights + cache_bytes(model.config, 2 * case.images, 1 + model.block_size // 2, **each)


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
