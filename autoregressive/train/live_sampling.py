"""Samples from weights in training: by an engine over a copy of them where that is faster, else by the model itself.

The model itself samples in its training format, under autocast and without compilation: on a GPU that is bound by
launching kernels, several times slower than an engine, whose steps are recorded.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from autoregressive.engine.build import make_engine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.noise import ImageNoise
from autoregressive.train.validation import reshard
from utils.ema import requires_grad
from utils.precision import DTYPES, HALF_PRECISION, autocast

# Conditions (n, ...), one seed per image, mask of the captions (n, T) or None -> codes int32 (n, block_size).
SampleCodes = Callable[[Tensor, Sequence[int], Tensor | None], Tensor]


def engine_samples(device: torch.device, sharded: bool) -> bool:
    """Whether an engine over a copy is to sample from weights on `device`: on a GPU that holds them whole.

    Samples of runs on a CPU stay what they were, and sharded weights are too large to be gathered in one place.
    """
    return device.type == "cuda" and not sharded


def sampling_copy(model: Transformer, precision: str) -> Transformer:
    """A model with the weights of `model` in the format of `precision`, without gradients, in evaluation mode.

    It is built anew, as the blocks of a model in training may be compiled or recompute activations. With "bf16" and
    "fp16" the weights are a copy, 2 bytes a parameter; in full precision they are the tensors of `model`.
    """
    with torch.device("meta"):
        copy = Transformer(model.config)
    dtype = DTYPES[precision] if precision in HALF_PRECISION else torch.float32
    copy.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()}, assign=True)
    requires_grad(copy.eval(), False)
    return copy


class LiveSampler:
    """Samples codes with the weights that a model has at the time.

    Args:
        precision: a value of ``--mixed-precision``.
        cfg_scale: guidance scale, on above 1.
        sharded: the weights are spread over processes, which all sample together.
    """

    def __init__(self, precision: str, cfg_scale: float, sharded: bool) -> None:
        self.precision, self.cfg_scale, self.sharded = precision, cfg_scale, sharded
        self._fits = True  # the engine and its copy of the weights, into memory

    @contextlib.contextmanager
    def sampling(self, model: Transformer) -> Iterator[SampleCodes]:
        """Inside, a function that samples with the weights of `model`, which must not change meanwhile.

        An engine samples with `ImageNoise`, the model with one `torch.Generator` per image; either way an image is a
        function of weights, condition and seed. The engine takes, from the first call to the end of the block, 2 bytes
        a parameter (none in full precision) and the cache of the largest batch: 2 * n_layer * rows * positions *
        kv_heads * head_dim numbers, with twice as many rows as images under guidance. If that is more than the GPU has
        left, the model samples, then and from then on.
        """
        engine: Engine | None = None

        def sample(cond: Tensor, seeds: Sequence[int], text: Tensor | None) -> Tensor:
            nonlocal engine
            if self._fits and engine_samples(cond.device, self.sharded):
                try:
                    if engine is None:
                        engine = make_engine(sampling_copy(model, self.precision))
                    return self._generate(engine, cond, ImageNoise(seeds, cond.device), text)
                except torch.cuda.OutOfMemoryError as error:
                    self._note_lack_of_memory(len(cond), error)
                engine = None  # not before the exception is gone, whose frames hold the engine too
                _release_memory(cond.device)
            return self._by_model(model, cond, seeds, text)

        try:
            yield sample
        finally:
            if engine is not None:
                device, engine = engine.model.tok_embeddings.weight.device, None
                _release_memory(device)

    def _by_model(self, model: Transformer, cond: Tensor, seeds: Sequence[int], text: Tensor | None) -> Tensor:
        generators = [torch.Generator(cond.device).manual_seed(seed) for seed in seeds]
        with autocast(cond.device, self.precision):
            codes = self._generate(model, cond, generators, text)
        reshard(model)
        return codes

    def _generate(
        self,
        model: Transformer | Engine,
        cond: Tensor,
        generators: ImageNoise | list[torch.Generator],
        text: Tensor | None,
    ) -> Tensor:
        options = {"cfg_scale": self.cfg_scale, "generators": generators}
        with torch.compiler.set_stance("force_eager"):  # to compile for a few images would take longer than they do
            return generate(model, cond, model.block_size, text, **options)

    def _note_lack_of_memory(self, images: int, error: Exception) -> None:
        self._fits = False
        logging.getLogger("llamagen").warning(
            "sampling with the model in training, which is slower: beside it the GPU has no memory left for a copy of "
            "the weights and the caches of %d images (%s)", images, str(error).split(". ")[0],
        )  # fmt: skip


def _release_memory(device: torch.device) -> None:
    """Give back what an engine that nobody names any more has held: its weights, caches and graphs."""
    gc.collect()  # an engine whose steps could not be recorded refers to itself
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # one of them is kept for the engine's own stream, which is gone
        torch.cuda.empty_cache()  # nobody else could use what the graphs had reserved
