"""Times of the Triton kernels of a decode step against their floors, and of their candidate launch parameters.

A time is that of one launch inside a CUDA graph of at least 20, over operands that no cache holds together. A floor is
the operands' bytes over the copy bandwidth measured here. `library_us` is the same by cuBLAS or by PyTorch's attention,
without the norm, residual, rotation and cache update that the kernels include.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.config import ModelArgs, sized_args
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernels import interpret_on_cpu

KERNELS = "autoregressive.engine.kernels"
TINY = ModelArgs(dim=32, n_layer=1, n_head=2, multiple_of=64, vocab_size=64, block_size=16)
ROWS = 16  # eight images and their unconditional rows
UNCACHED_BYTES = 256e6  # several times the L2 cache of an H100 (50 MB) or H200 (60 MB)
LAUNCHES = 20  # in a graph, at the least
RESERVE_S = 4.0  # seconds before the section's end after which nothing more is timed

Launch = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Something to time: `make` allocates operands of `bytes` in total and returns the launch that works on them.

    `library`, if any, makes the launch of the library's equivalent.
    """

    name: str
    bytes: float
    make: Callable[[], Launch]
    library: Callable[[], Launch] | None = None


def run(context: Context) -> None:
    """Each kernel at the shapes of GPT-L and GPT-3B, then the sweeps over launch parameters."""
    interpret_on_cpu(context)
    sizes = ("tiny",) if context.tiny else ("GPT-L", "GPT-3B")
    modules = {name: importlib.import_module(f"{KERNELS}.{name}") for name in ("sampler", "linear", "attention")}
    clock = Clock(context)
    shapes = {size: Shapes(context, size, modules["linear"]) for size in sizes}
    timings = [timing for size in sizes for timing in shapes[size].timings(modules)]
    compile_together(context, [timing.make for timing in timings])
    for timing in timings:
        with context.attempt(timing.name):
            clock.report(timing)
        context.free()
    for size in reversed(sizes):
        sweep(context, clock, shapes[size], modules["linear"].candidate_configs)


class Clock:
    """Times launches on one device."""

    def __init__(self, context: Context) -> None:
        self.context = context
        size = 2**12 if context.tiny else 2**30
        source, target = (torch.zeros(size, dtype=torch.uint8, device=context.device) for _ in range(2))
        self.bytes_per_s = 2 * size / (context.median_ms(lambda: target.copy_(source)) / 1e3)
        context.record("copy", bytes_per_s=self.bytes_per_s, gb=size / 1e9)

    def microseconds(self, make: Callable[[], Launch], operand_bytes: float) -> float:
        """The time of one of the launches that `make` gives, each with operands of its own."""
        sets = 1 if self.context.tiny else max(2, -(-int(UNCACHED_BYTES) // int(operand_bytes)))
        launches = [make() for _ in range(sets)]
        count = 1 if self.context.tiny else max(LAUNCHES, sets)

        def everything() -> None:
            for i in range(count):
                launches[i % sets]()

        if self.context.device.type == "cuda":
            launches[0]()  # compiles, which a capture cannot
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                everything()
            return self.context.median_ms(graph.replay, repeats=7, warm_up=2) / count * 1e3
        return self.context.median_ms(everything) / count * 1e3

    def report(self, timing: Timing) -> None:
        """Record the time of a kernel with its floor and the library's time."""
        if not self.context.has_time(timing.name, RESERVE_S):
            return
        us, floor = self.microseconds(timing.make, timing.bytes), timing.bytes / self.bytes_per_s * 1e6
        values = {"us": us, "floor_us": floor, "share_of_copy_bandwidth": floor / us}
        if timing.library is not None:
            values["library_us"] = self.microseconds(timing.library, timing.bytes)
        self.context.record(timing.name, **values)


def compile_together(context: Context, makes: list[Callable[[], Launch]]) -> None:
    """Launch each once, several at a time: most of that is compiling, which leaves Python to the others.

    A launch that fails says so where it is timed.
    """

    def once(make: Callable[[], Launch]) -> str:
        try:
            make()()
            return ""
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"

    with ThreadPoolExecutor(8 if context.device.type == "cuda" else 1) as pool:
        started = time.perf_counter()
        failed = [text for text in pool.map(once, makes) if text]
    context.synchronize()
    seconds = time.perf_counter() - started
    context.record("first launches", launches=len(makes), seconds=round(seconds, 1), failed=failed)
    context.free()


class Shapes:
    """The kernels of a decode step of one model at 384 pixels: `ROWS` rows in bfloat16."""

    def __init__(self, context: Context, size: str, linear: ModuleType) -> None:
        self.config = TINY if context.tiny else sized_args(size, block_size=576)
        self.size, self.linear = size, linear
        self.rows = 2 if context.tiny else ROWS
        self.device, self.dtype = context.device, torch.bfloat16

    def timings(self, modules: dict[str, ModuleType]) -> list[Timing]:
        """All kernels, with bfloat16 weights first."""
        products = [*self.products(), self.gated()]
        quantized = [*self.products(int8=True), self.gated(int8=True)]
        return [*products, self.attention(modules["attention"]), *self.sampling(modules["sampler"]), *quantized]

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of deviation 0.05; int8 ones from -127 to 127."""
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, dtype=dtype, device=self.device)
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device) * 0.05

    def product_shapes(self) -> dict[str, tuple[int, int, bool]]:
        """Name -> (outputs N, inputs K, whether the norm comes first) of the plain products and of the head."""
        c = self.config
        heads = (c.n_head + 2 * c.kv_heads) * c.head_dim
        wqkv, wo, w2 = (heads, c.dim, True), (c.dim, c.dim, False), (c.dim, c.ffn_hidden, False)
        return {"wqkv": wqkv, "wo": wo, "w2": w2, "head": (c.vocab_size, c.dim, True)}

    def products(self, int8: bool = False) -> list[Timing]:
        """The plain products; those without a norm add their result to a residual stream."""
        return [
            Timing(
                f"{self.size} {name}{' int8' * int8}",
                n * k * (1 if int8 else 2) + 2 * self.rows * (n + k),
                partial(self.product, n, k, norm, int8),
                None if int8 else partial(self.library_product, n, k),
            )
            for name, (n, k, norm) in self.product_shapes().items()
        ]

    def product(self, n: int, k: int, norm: bool, int8: bool = False, config: Any = None) -> Launch:
        """A launch of `linear` on a stream, or without a norm of `add_linear`, with weights (n, k)."""
        options = {"scale": self.random(n) if int8 else None, "config": config}
        weight = self.random(n, k, dtype=torch.int8 if int8 else None)
        if norm:
            return partial(self.linear.linear, self.stream(k), weight, **options)
        stream = self.random(self.rows, n), self.random(n)
        return partial(self.linear.add_linear, self.random(self.rows, k), weight, *stream, **options)

    def stream(self, dim: int) -> Any:
        """A residual stream of `dim` numbers a row, ready for a norm."""
        tokens = torch.arange(self.rows, device=self.device)
        return self.linear.embed(tokens, self.random(self.rows, dim), self.random(dim))

    def library_product(self, n: int, k: int) -> Launch:
        """The product alone."""
        return partial(F.linear, self.random(self.rows, k), self.random(n, k))

    def gated(self, int8: bool = False) -> Timing:
        """Both products of the feed-forward layer that are multiplied; the library does them as one."""
        n, k = self.config.ffn_hidden, self.config.dim
        return Timing(
            f"{self.size} swiglu{' int8' * int8}",
            2 * n * k * (1 if int8 else 2) + 2 * self.rows * (n + k),
            partial(self.swiglu, int8),
            None if int8 else partial(self.library_product, 2 * n, k),
        )

    def swiglu(self, int8: bool = False, config: Any = None) -> Launch:
        """A launch of `swiglu`."""
        n, k = self.config.ffn_hidden, self.config.dim
        weights = [self.random(n, k, dtype=torch.int8 if int8 else None) for _ in range(2)]
        scales = {"scale1": self.random(n), "scale3": self.random(n)} if int8 else {}
        return partial(self.linear.swiglu, self.stream(k), *weights, config=config, **scales)

    def attention(self, module: ModuleType) -> Timing:
        """Attention at the middle position of an image: 289 cached ones of 577 at 384 pixels."""
        c, position = self.config, 1 + self.config.block_size // 2
        read = 2 * self.rows * c.kv_heads * position * c.head_dim * 2

        def caches() -> tuple[Tensor, Tensor]:
            padded = -(-c.head_dim // 8) * 8  # rows of whole 16-byte words
            shape = (self.rows, c.kv_heads, c.block_size + 1, padded)
            return tuple(self.random(*shape)[..., : c.head_dim] for _ in range(2))  # type: ignore[return-value]

        def make() -> Launch:
            table = self.random(c.block_size + 1, c.head_dim // 2, 2, dtype=torch.float32)
            qkv = self.random(self.rows, (c.n_head + 2 * c.kv_heads) * c.head_dim)
            place = torch.tensor([position], device=self.device)
            out = self.random(self.rows, c.dim)
            return partial(module.decode_attention, qkv, table, place, *caches(), n_head=c.n_head, out=out)

        def library() -> Launch:
            keys, values = (cache[:, :, : position + 1] for cache in caches())
            query = self.random(self.rows, c.n_head, 1, c.head_dim)
            return partial(F.scaled_dot_product_attention, query, keys, values)

        return Timing(f"{self.size} attention at {position}", read, make, library)

    def sampling(self, module: ModuleType) -> list[Timing]:
        """The end of a step with the filters of the published samples, and with top-p besides."""
        images, count, v = self.rows // 2, self.config.block_size, self.config.vocab_size

        def make(**filters: Any) -> Launch:
            whole = {"dtype": torch.int64, "device": self.device}
            vectors = [torch.full((count,), value, device=self.device) for value in (2.0, 1.0)]
            index, noise_from = (torch.zeros(1, **whole) for _ in range(2))
            seeds = torch.arange(images, **whole)
            forced, tokens = (torch.full((images, count), -1, **whole) for _ in range(2))
            arguments = [*vectors, index, seeds, noise_from, forced, tokens, torch.zeros(images, 1, **whole)]
            logits = 40 * self.random(2 * images, v, dtype=torch.float32)
            return partial(module.sample_tokens, logits, *arguments, with_uncond=True, greedy=False, **filters)

        top_k = {"top_k": min(2000, v // 2), "top_p": 1.0, "min_p": 0.0}
        both = {**top_k, "top_p": 0.95}
        read = 2 * images * v * 4
        label = f"{self.size} sample_tokens top_k {top_k['top_k']}"
        return [Timing(label, read, partial(make, **top_k)), Timing(f"{label} top_p 0.95", read, partial(make, **both))]


def sweep(context: Context, clock: Clock, shapes: Shapes, candidates: Callable[..., list[Any]]) -> None:
    """Times of the products under each of their candidate launch parameters."""
    made: dict[str, tuple[float, dict[str, Callable[[], Launch]]]] = {}
    for name, (n, k, norm) in shapes.product_shapes().items():
        configs = candidates(shapes.rows, n, k)
        made[name] = 2.0 * n * k, {str(c): partial(shapes.product, n, k, norm, config=c) for c in configs}
    n, k = shapes.config.ffn_hidden, shapes.config.dim
    configs = candidates(shapes.rows, n, k, 2)
    made["swiglu"] = 4.0 * n * k, {str(c): partial(shapes.swiglu, config=c) for c in configs}
    if context.tiny:
        made = {name: (size, dict(list(makes.items())[:1])) for name, (size, makes) in list(made.items())[-1:]}
    if context.seconds_left > RESERVE_S:
        compile_together(context, [make for _, makes in made.values() for make in makes.values()])
    for name, (size, makes) in made.items():
        if not context.has_time(f"{shapes.size} {name} sweep", RESERVE_S):
            continue
        with context.attempt(f"{shapes.size} {name} sweep"):
            times = {}
            for config, make in makes.items():
                if context.seconds_left > RESERVE_S:
                    times[config] = _time_or_error(clock, make, size)
                    context.free()
            found = {config: us for config, us in times.items() if isinstance(us, float)}
            best = min(found, key=found.__getitem__, default=None)
            values = {"best": best, "best_us": found.get(best), "default_us": next(iter(times.values()), None)}
            context.record(f"{shapes.size} {name} sweep", **values, us=times, candidates=len(makes))


def _time_or_error(clock: Clock, make: Callable[[], Launch], operand_bytes: float) -> float | str:
    """Microseconds of a launch, or why it failed, which says nothing of the other candidates."""
    try:
        return clock.microseconds(make, operand_bytes)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
