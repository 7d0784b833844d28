"""From a name to an engine: the one place where `engine=`, `quantize=` and `kv_cache_dtype=` are understood."""

from __future__ import annotations

import argparse
import importlib.util
import logging

from autoregressive.engine.compiler import CannotCompile
from autoregressive.engine.native import NativeEngine, unsupported
from autoregressive.engine.static import StaticEngine
from autoregressive.models.engine import Engine
from autoregressive.models.gpt import Transformer

ENGINES = ("auto", "eager", "compiled", "triton", "native")
QUANTIZE = ("none", "int8")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """How the GPT is computed."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="native: C++ on a CPU, compiled on first use; triton: fused kernels and CUDA graphs on an NVIDIA GPU; "
        "compiled: torch.compile, on a GPU with CUDA graphs; eager: PyTorch as it is; auto: triton on a GPU, native on "
        "a CPU",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="none",
        help="int8: the GPT's matrices in 8 bits (native: activations too); faster, slightly other pictures",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="format of the keys and values that the GPT keeps of an image's earlier tokens. auto (default): that of "
        "its weights; int8, fp8: 8 bits a number and a scale for each vector, which takes about half of the memory of "
        "bf16 and gives slightly other images. int8 needs --engine triton or native; fp8 triton, on a GPU of compute "
        "capability 8.9 or later",
    )


def make_engine(
    model: Transformer, engine: str = "auto", quantize: str = "none", kv_cache_dtype: str = "auto"
) -> Engine:
    """The engine for `model`, which must be in its final place and format.

    "auto" takes the triton one on a GPU and the native one on a CPU. Where that cannot be had it falls back to the
    compiled one on a GPU and the eager one on a CPU, and says why. `kv_cache_dtype` is the format of cached keys and
    values, one of `KV_CACHE_DTYPES`.

    Raises:
        ValueError: an engine that cannot compute this model, or a quantization or caches that the engine does not have.
    """
    if engine not in ENGINES or quantize not in QUANTIZE or kv_cache_dtype not in KV_CACHE_DTYPES:
        known = f"engines are {', '.join(ENGINES)}, quantizations {', '.join(QUANTIZE)}"
        known += f", formats of caches {', '.join(KV_CACHE_DTYPES)}"
        raise ValueError(f"{known}; got {engine!r}, {quantize!r} and {kv_cache_dtype!r}")
    if engine == "auto":
        return _automatic(model, quantize, kv_cache_dtype)
    if engine == "native":
        return _native(model, quantize, kv_cache_dtype)
    if engine == "triton":
        return _fused(model, quantize, kv_cache_dtype)
    if kv_cache_dtype != "auto":
        raise ValueError(
            f"--kv-cache-dtype {kv_cache_dtype} needs a triton or native engine; {engine} keeps the model's format"
        )
    if engine == "compiled":
        return StaticEngine(model, quantize)
    if quantize != "none":
        raise ValueError(f"--quantize {quantize} needs a native, triton or compiled engine; {engine} keeps the format")
    return Engine(model)


def _native(model: Transformer, quantize: str, kv_cache_dtype: str) -> Engine:
    """The engine in C++. ValueError for caches or a model that it does not have; CannotCompile without a compiler."""
    if kv_cache_dtype == "fp8":
        raise ValueError("--kv-cache-dtype fp8 needs the triton engine and its GPU; the native engine has int8")
    return NativeEngine(model, quantize, kv_cache_dtype=kv_cache_dtype)


def _fused(model: Transformer, quantize: str, kv_cache_dtype: str) -> Engine:
    """The engine of Triton kernels. ValueError where they are not to be had."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the triton engine needs the package triton, which comes with PyTorch for NVIDIA GPUs")
    from autoregressive.engine.fused import FusedEngine  # imports triton

    return FusedEngine(model, quantize, kv_cache_dtype)


def _automatic(model: Transformer, quantize: str, kv_cache_dtype: str) -> Engine:
    if next(model.parameters()).device.type == "cuda":
        try:
            return _fused(model, quantize, kv_cache_dtype)
        except ValueError as error:
            if kv_cache_dtype != "auto":
                raise
            logging.getLogger("llamagen").warning("sampling with compiled blocks, which is slower: %s", error)
            return StaticEngine(model, quantize, compile_blocks=importlib.util.find_spec("triton") is not None)
    reason = unsupported(model)
    if reason is None:
        try:
            return _native(model, quantize, kv_cache_dtype)
        except CannotCompile as error:
            reason = str(error)
    if quantize != "none":
        raise ValueError(f"--quantize {quantize} needs the native engine: {reason}")
    if kv_cache_dtype != "auto":
        raise ValueError(f"--kv-cache-dtype {kv_cache_dtype} needs the native engine: {reason}")
    logging.getLogger("llamagen").warning("sampling in plain PyTorch, which is several times slower: %s", reason)
    return Engine(model)
