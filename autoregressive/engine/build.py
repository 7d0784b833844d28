"""From a name to an engine: the one place where `engine=` and `quantize=` are understood."""

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


def make_engine(model: Transformer, engine: str = "auto", quantize: str = "none") -> Engine:
    """The engine for `model`, which must be in its final place and format.

    "auto" takes the triton one on a GPU and the native one on a CPU. Where that cannot be had it falls back to the
    compiled one on a GPU and the eager one on a CPU, and says why.

    Raises:
        ValueError: an engine that cannot compute this model, or a quantization that the engine does not have.
    """
    if engine not in ENGINES or quantize not in QUANTIZE:
        known = f"engines are {', '.join(ENGINES)}, quantizations {', '.join(QUANTIZE)}"
        raise ValueError(f"{known}; got {engine!r} and {quantize!r}")
    if engine == "auto":
        return _automatic(model, quantize)
    if engine == "native":
        return NativeEngine(model, quantize)
    if engine == "compiled":
        return StaticEngine(model, quantize)
    if engine == "triton":
        return _fused(model, quantize)
    if quantize != "none":
        raise ValueError(f"--quantize {quantize} needs a native, triton or compiled engine; {engine} keeps the format")
    return Engine(model)


def _fused(model: Transformer, quantize: str) -> Engine:
    """The engine of Triton kernels. ValueError where they are not to be had."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the triton engine needs the package triton, which comes with PyTorch for NVIDIA GPUs")
    from autoregressive.engine.fused import FusedEngine  # imports triton

    return FusedEngine(model, quantize)


def _automatic(model: Transformer, quantize: str) -> Engine:
    if next(model.parameters()).device.type == "cuda":
        try:
            return _fused(model, quantize)
        except ValueError as error:
            logging.getLogger("llamagen").warning("sampling with compiled blocks, which is slower: %s", error)
            return StaticEngine(model, quantize, compile_blocks=importlib.util.find_spec("triton") is not None)
    reason = unsupported(model)
    if reason is None:
        try:
            return NativeEngine(model, quantize)
        except CannotCompile as error:
            reason = str(error)
    if quantize != "none":
        raise ValueError(f"--quantize {quantize} needs the native engine: {reason}")
    logging.getLogger("llamagen").warning("sampling in plain PyTorch, which is several times slower: %s", reason)
    return Engine(model)
