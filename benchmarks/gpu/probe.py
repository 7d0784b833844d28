"""What the machine is and does: versions, attention kernels, ceilings of memory and products, TF32, process groups."""

from __future__ import annotations

import importlib.metadata
import json
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.layers import aligned_attention
from benchmarks.gpu.context import Context
from benchmarks.gpu.profiling import profile, short
from tokenizer.nearest import exact_arithmetic
from utils.distributed import group_device, process_group
from utils.precision import allow_tf32

_PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "transformers", "pillow")
_COPIED_BYTES = 2_200_000_000  # read once and written once
_EDGE = 8192


def run(context: Context) -> None:
    """All parts of this section."""
    with context.attempt("ceilings"):
        measure_ceilings(context)
    with context.attempt("versions"):
        versions(context)
    with context.attempt("attention"):
        attention_kernels(context)
    with context.attempt("exact arithmetic"):
        exactness(context)
    with context.attempt("process group"):
        backend(context)


def ceilings(context: Context) -> tuple[float, float]:
    """GB/s of a copy, counting bytes read and written, and TFLOP/s of a bfloat16 product.

    Read from the records of this run if they are there, else measured and written down.
    """
    path = context.out / "records.jsonl"
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        record = json.loads(line)
        if record["name"] == "ceilings" and "product_tflops" in record:
            return record["copy_gb_per_s"], record["product_tflops"]
    return measure_ceilings(context)


def measure_ceilings(context: Context) -> tuple[float, float]:
    """Measure and record what `ceilings` gives, on random data: zeros draw less power and run faster."""
    count = (_COPIED_BYTES if not context.tiny else 2**20) // 4
    source = torch.randn(count, device=context.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / context.median_ms(partial(target.copy_, source)) / 1e6
    edge = _EDGE if not context.tiny else 128
    a, b = (torch.randn(edge, edge, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * edge**3 / context.median_ms(lambda: a @ b, warm_up=20) / 1e9
    context.record("ceilings", copy_gb_per_s=copy, product_tflops=product)
    return copy, product


def versions(context: Context) -> None:
    """Record versions, and what attention torch prefers (its order of `torch.nn.attention.SDPBackend`)."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    context.record("versions", **found)
    cuda = context.device.type == "cuda"
    context.record(
        "attention order",
        cudnn=torch.backends.cudnn.version() if cuda else None,
        cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled(),
        order=[int(choice) for choice in torch._C._get_sdp_priority_order()],
        capability=list(torch.cuda.get_device_capability(context.device)) if cuda else None,
    )


def attention_kernels(context: Context) -> None:
    """Check attention for decoding with a mask, without one, and for a training sequence; record its kernels."""
    rows, heads, keys = (16, 16, 577) if not context.tiny else (2, 2, 17)
    for dim in (64, 100):
        query, cached = (_normal(context, rows, heads, length, dim) for length in (1, keys))
        sequence = _normal(context, rows, heads, keys - 1, dim)
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=context.device)
        mask[..., keys // 2 :] = False
        cases = {
            "decode, mask": (query, cached, {"attn_mask": mask}),
            "decode": (query, cached, {}),
            "causal": (sequence, sequence, {"is_causal": True}),
        }
        for name, case in cases.items():
            with context.attempt(f"attention {name}, head_dim {dim}"):
                _attention_case(context, name, *case)


def _attention_case(context: Context, name: str, query: Tensor, cached: Tensor, options: dict) -> None:
    def attend() -> Tensor:
        return aligned_attention(query, cached, cached, **options)

    for _ in range(3):
        attend()
    totals = profile(context, attend).totals
    kernels = [short(kernel) for kernel in list(totals)[:6]]
    us = 1e3 * sum(total for _, total in totals.values())  # of the kernels alone: launching them may take longer
    context.record("attention", case=name, head_dim=query.shape[-1], kernel_us=us, kernels=kernels)
    exact = F.scaled_dot_product_attention(query.double(), cached.double(), cached.double(), **options)
    error = _difference(attend(), exact.cpu())
    context.check(f"attention {name}, head_dim {query.shape[-1]}: values", error < 0.02, error=error)


def _normal(context: Context, *shape: int) -> Tensor:
    return torch.randn(*shape, device=context.device, dtype=torch.bfloat16)


def exactness(context: Context) -> None:
    """Check that `exact_arithmetic` computes in float32 where TF32 is allowed, and record what TF32 does."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 64, 32, 32, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator)
    matrix = torch.randn(512, 512, generator=generator)
    works = {
        "conv": (lambda x, w: F.conv2d(x, w, padding=1), image, weight),
        "matmul": (torch.matmul, matrix, matrix),
    }
    allow_tf32()
    for name, (work, *operands) in works.items():
        exact = work(*(operand.double() for operand in operands))
        operands = [operand.to(context.device) for operand in operands]
        with exact_arithmetic(context.device.type):
            inside = _difference(work(*operands), exact)
        outside = _difference(work(*operands), exact)
        context.check(f"float32 {name}", inside < 1e-5, inside=inside, with_tf32=outside)


def _difference(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


def backend(context: Context) -> None:
    """Check that a process group exchanges tensors on the device that it computes on."""
    with process_group(context.device.type, even_alone=True) as device:
        place = group_device()
        total = torch.ones(3, device=place)
        dist.all_reduce(total)
        context.check(
            "process group",
            place.type == device.type and total.tolist() == [1, 1, 1],
            backend=dist.get_backend(), group_device=str(place),
        )  # fmt: skip
