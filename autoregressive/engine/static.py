"""Decoding with fixed shapes and addresses, for GPUs: compiled blocks, and every step replayed as one CUDA graph.

Nothing in a step is decided in Python: the position, the guidance scale, the temperature, the noise and the tokens are
tensors that the step itself reads and advances, and the token is drawn inside it. So a step can be captured once and
replayed without the host waiting for anything. Attention reads a prefix of the cache that is rounded up to a bucket;
each bucket has a graph of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoregressive.engine.weight_only import int8_copy, sharing_copy
from autoregressive.models.cache import DecodeCache
from autoregressive.models.engine import Engine
from autoregressive.models.generate import decode_n_tokens
from autoregressive.models.gpt import Transformer
from autoregressive.models.guidance import null_rows_needed
from autoregressive.models.noise import ImageNoise, exponential_noise
from autoregressive.models.sampling import logits_to_probs

_BUCKETS = 5


class StaticCache(DecodeCache):
    """Caches whose filled length is known to tensors alone while `fixed`; else like any other."""

    fixed = False

    def extend(self, rows: int, count: int) -> Tensor | None:
        """Nothing to do while fixed: positions and mask come with the call."""
        return None if self.fixed else super().extend(rows, count)


@dataclass(frozen=True)
class StepKind:
    """What is fixed in a captured step."""

    images: int
    with_null: bool
    keys: int  # positions that attention reads
    masked: bool
    sampling: tuple[tuple[str, Any], ...]


@dataclass
class StepState:
    """What a step reads and advances; N is the number of tokens to decode."""

    x: Tensor  # int64 (B, 1), the token to feed
    position: Tensor  # int64 (1,), where it stands
    index: Tensor  # int64 (1,), which of the N tokens is drawn
    tokens: Tensor  # int64 (B, N), what was drawn
    given: Tensor  # int64 (B, N), -1 where nothing is given
    scales: Tensor  # float32 (N,), guidance
    heat: Tensor  # float32 (N,), temperatures
    seeds: Tensor  # int64 (B,)
    noise_from: Tensor  # int64 (1,), position of the noise of the first of the N tokens
    key_mask: Tensor  # bool (rows, positions)

    @classmethod
    def allocate(cls, images: int, rows: int, count: int, positions: int, device: torch.device) -> StepState:
        """Buffers for `count` tokens of `images`."""
        whole = {"dtype": torch.int64, "device": device}
        return cls(
            x=torch.zeros(images, 1, **whole),
            position=torch.zeros(1, **whole),
            index=torch.zeros(1, **whole),
            tokens=torch.zeros(images, count, **whole),
            given=torch.full((images, count), -1, **whole),
            scales=torch.ones(count, device=device),
            heat=torch.ones(count, device=device),
            seeds=torch.zeros(images, **whole),
            noise_from=torch.zeros(1, **whole),
            key_mask=torch.ones(rows, positions, dtype=torch.bool, device=device),
        )

    def rewind(self, x: Tensor, position: Tensor, index: Tensor) -> None:
        """Back to an earlier step; what it and later ones wrote is written again."""
        self.x.copy_(x), self.position.copy_(position), self.index.copy_(index)


class StaticEngine(Engine):
    """Compiled blocks and, on a GPU, captured steps; caches always have room for a whole image.

    Draws with counted noise (`ImageNoise`) or greedily; with other generators it computes as the plain engine does.
    `quantize` "int8" holds the matrices as int8 and computes in the model's format. The model itself is left as it is.
    `compile_blocks` False leaves the blocks as they are. Graphs are kept by shape and options, so later generations
    start at once; `ready_seconds` counts what preparing them has taken so far.
    """

    name = "compiled"

    def __init__(self, model: Transformer, quantize: str = "none", compile_blocks: bool = True) -> None:
        super().__init__(int8_copy(model) if quantize == "int8" else sharing_copy(model))
        self.ready_seconds = 0.0
        self._state: StepState | None = None
        self._steps: dict[StepKind, Callable[[], None]] = {}
        self._pool: Any = None
        if compile_blocks:
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
            for layer in self.model.layers:
                layer.compile()

    def new_cache(
        self, rows: int, positions: int, dtype: torch.dtype, device: torch.device, key_mask: Tensor | None
    ) -> StaticCache:
        """Empty caches for whole images; graphs live as long as these are large enough."""
        positions = self.model.cls_token_num + self.model.block_size
        if self._cache is None or not self._cache.fits(rows, positions, dtype, device):
            self._cache = self._state = self._pool = None
            self._steps.clear()
            self._cache = StaticCache.allocate(self.model.config, rows, positions, dtype, device)
        cache = self._cache
        cache.fixed, cache.length, cache.key_mask = False, 0, key_mask
        return cache

    def decode_n_tokens(
        self,
        cur_token: Tensor,
        input_pos: Tensor,
        num_new_tokens: int,
        *,
        scales: list[float],
        heat: list[float],
        cache: StaticCache,
        given: Tensor | None = None,
        on_token: Callable[[int], None] | None = None,
        out: Tensor | None = None,
        generators: Any = None,
        **sampling: Any,
    ) -> Tensor:
        """As `generate.decode_n_tokens`, one replay per token; `on_token` is called when a step has been queued."""
        if out is None:
            out = cur_token.new_empty(len(cur_token), num_new_tokens)
        drawn = sampling.get("sample_logits", True)
        if num_new_tokens == 0 or (drawn and not isinstance(generators, ImageNoise)):
            return decode_n_tokens(
                self, cur_token, input_pos, num_new_tokens, 1.0, -1, scales=scales, heat=heat, cache=cache,
                given=given, on_token=on_token, out=out, generators=generators, **sampling,
            )  # fmt: skip
        state = self._fill_state(cur_token, input_pos, num_new_tokens, scales, heat, cache, given, generators)
        null_steps, first = null_rows_needed(scales), cache.length
        cache.fixed = True
        for step in range(num_new_tokens):
            kind = StepKind(
                images=len(cur_token),
                with_null=step < null_steps,
                keys=self._bucket(first + step + 1),
                masked=cache.key_mask is not None,
                sampling=tuple(sorted(sampling.items())),
            )
            self._step(kind, state, cache)()
            if on_token is not None:
                out[:, step] = state.tokens[:, step]
                on_token(step + 1)
        cache.length = first + num_new_tokens
        return out.copy_(state.tokens[:, :num_new_tokens])

    def _bucket(self, keys: int) -> int:
        """The number of positions that attention reads where `keys` are filled."""
        positions = self.model.cls_token_num + self.model.block_size
        size = -(-positions // _BUCKETS)
        return min(-(-keys // size) * size, positions)

    def _fill_state(
        self,
        cur_token: Tensor,
        input_pos: Tensor,
        count: int,
        scales: list[float],
        heat: list[float],
        cache: StaticCache,
        given: Tensor | None,
        noise: ImageNoise | None,
    ) -> StepState:
        images, device = len(cur_token), cur_token.device
        rows, _, positions, _ = cache.layers[0].k_cache.shape
        if self._state is None or len(self._state.x) != images:
            self._steps.clear()
            self._state = StepState.allocate(images, rows, self.model.block_size, positions, device)
        state = self._state
        state.rewind(cur_token, input_pos, torch.zeros_like(input_pos))
        state.scales[:count] = torch.tensor(scales[:count], device=device)
        state.heat[:count] = torch.tensor(heat[:count], device=device).clamp(min=1e-5)
        state.given.fill_(-1)
        if given is not None:
            state.given[:, :count] = given
        if cache.key_mask is not None:
            seen = cache.key_mask
            state.key_mask.fill_(True)
            state.key_mask[: seen.shape[0], : seen.shape[1]] = seen
        if isinstance(noise, ImageNoise):
            state.seeds.copy_(noise.seeds), state.noise_from.fill_(noise.position)
            noise.position += count
        return state

    def _step(self, kind: StepKind, state: StepState, cache: StaticCache) -> Callable[[], None]:
        """What runs one step of this kind: a graph on a GPU, else the step itself."""
        for layer in cache.layers:
            layer.length = kind.keys
        if kind not in self._steps:
            started = time.perf_counter()
            self._steps[kind] = self._prepare(kind, state, cache)
            self.ready_seconds += time.perf_counter() - started
        return self._steps[kind]

    def _prepare(self, kind: StepKind, state: StepState, cache: StaticCache) -> Callable[[], None]:
        def run() -> None:
            self.advance(kind, state, cache)

        return self._capture(run, state) if state.x.device.type == "cuda" else run

    def _capture(self, run: Callable[[], None], state: StepState) -> Callable[[], None]:
        """`run` as a CUDA graph, or as it is where it cannot be captured."""
        before = state.x.clone(), state.position.clone(), state.index.clone()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, chooses kernels, allocates work space
                    run()
                    state.rewind(*before)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run()
            self._pool = self._pool or graph.pool()
            return graph.replay
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            logging.getLogger("llamagen").warning("steps run without a CUDA graph: %s", error)
            return run
        finally:
            state.rewind(*before)

    def advance(self, kind: StepKind, state: StepState, cache: StaticCache) -> None:
        """One step: feed state.x, draw, write down, move on. Only tensors change."""
        x = torch.cat([state.x, state.x]) if kind.with_null else state.x
        keys = torch.arange(kind.keys, device=x.device)
        mask = (keys <= state.position)[None, None, None]
        if kind.masked:
            own = state.key_mask[: len(x), None, None, : kind.keys]
            mask = (mask & own) | (keys == state.position)
        logits, _ = self.model(x, None, state.position, mask=mask, cache=cache)
        logits = logits[:, -1]
        if kind.with_null:
            cond, uncond = logits.chunk(2)
            scale = state.scales[state.index]
            logits = torch.where(scale > 1, uncond + scale * (cond - uncond), cond)
        drawn = self._draw(logits / state.heat[state.index], state, dict(kind.sampling))
        given = state.given.gather(1, state.index.expand(len(drawn), 1))
        drawn = torch.where(given < 0, drawn, given)
        state.tokens.scatter_(1, state.index.expand(len(drawn), 1), drawn)
        state.x.copy_(drawn)
        state.position.add_(1)
        state.index.add_(1)

    @staticmethod
    def _draw(logits: Tensor, state: StepState, sampling: dict[str, Any]) -> Tensor:
        """Tokens int64 (B, 1) of logits (B, V) that are divided by the temperature already."""
        if not sampling.pop("sample_logits", True):
            return logits.argmax(dim=-1, keepdim=True)
        probs = logits_to_probs(logits, **sampling)
        noise = exponential_noise(state.seeds, state.noise_from + state.index, logits.shape[-1])
        return (probs / noise).argmax(dim=-1, keepdim=True)
