"""Decoding with fixed shapes and addresses, for GPUs: compiled blocks, and every step replayed as one CUDA graph.

Nothing in a step is decided in Python: the position, the guidance scale, the temperature, the noise and the tokens are
tensors that the step itself reads and advances, and the token is sampled inside it. So a step can be recorded once and
replayed without the host waiting for anything. Batches are filled up to a few sizes, and attention reads a prefix of
the cache that is rounded up to a bucket; each size and bucket has a graph of its own, kept for later generations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoregressive.engine.cuda_graphs import CudaGraphs, Pace, Step
from autoregressive.engine.weight_only import int8_copy, sharing_copy
from autoregressive.models.cache import DecodeCache, FixedCache
from autoregressive.models.engine import Engine
from autoregressive.models.generate import OnToken, decode_n_tokens, generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.guidance import null_rows_needed
from autoregressive.models.noise import ImageNoise, exponential_noise
from autoregressive.models.sampling import logits_to_probs

_MOST_GRAPHS = 64  # a server's clients may ask for any sampling settings, and each has graphs of its own
_BUCKET = 128  # positions; masks of other lengths than multiples of 8 are copied by the attention kernels


def padded_batch(images: int) -> int:
    """The number of images that a batch is filled up to: a power of two up to 64, then a multiple of 64."""
    return 1 << (images - 1).bit_length() if images <= 64 else -(-images // 64) * 64


@dataclass(frozen=True)
class GraphKey:
    """What is fixed in a recorded step."""

    images: int  # after padding
    with_uncond: bool
    keys: int  # positions that attention reads
    masked: bool
    sampling: tuple[tuple[str, Any], ...]


@dataclass
class DecodeBuffers:
    """What the steps of one padded batch size B read and advance; N is the number of tokens of a whole image."""

    x: Tensor  # int64 (B, 1), the token to feed
    position: Tensor  # int64 (1,), where it stands
    index: Tensor  # int64 (1,), which of the tokens is sampled
    tokens: Tensor  # int64 (B, N), what was sampled
    forced_tokens: Tensor  # int64 (B, N), -1 where none is
    scales: Tensor  # float32 (N,), guidance
    temperatures: Tensor  # float32 (N,)
    seeds: Tensor  # int64 (B,)
    noise_from: Tensor  # int64 (1,), position of the noise of the first token
    key_mask: Tensor  # bool (2B, positions), False where a caption is padded
    first_key: Tensor  # int64 (2B,), where `key_mask` begins to be True

    @classmethod
    def allocate(cls, images: int, count: int, positions: int, device: torch.device) -> DecodeBuffers:
        """Buffers for `count` tokens of `images`."""
        whole = {"dtype": torch.int64, "device": device}
        return cls(
            x=torch.zeros(images, 1, **whole),
            position=torch.zeros(1, **whole),
            index=torch.zeros(1, **whole),
            tokens=torch.zeros(images, count, **whole),
            forced_tokens=torch.full((images, count), -1, **whole),
            scales=torch.ones(count, device=device),
            temperatures=torch.ones(count, device=device),
            seeds=torch.zeros(images, **whole),
            noise_from=torch.zeros(1, **whole),
            key_mask=torch.ones(2 * images, positions, dtype=torch.bool, device=device),
            first_key=torch.zeros(2 * images, **whole),
        )

    def start(self, x: Tensor, position: Tensor, scales: list[float], temperatures: list[float]) -> None:
        """Begin with tokens `x` (images, 1) at `position`; rows beyond these images keep what they hold."""
        self.x[: len(x)], self.index[:] = x, 0
        self.position.copy_(position)
        self.scales[: len(scales)] = torch.tensor(scales, device=x.device)
        self.temperatures[: len(temperatures)] = torch.tensor(temperatures, device=x.device).clamp(min=1e-5)

    def force(self, tokens: Tensor | None) -> None:
        """Tokens (images, n) to put in place of the sampled ones, -1 where none is; None: none at all."""
        self.forced_tokens.fill_(-1)
        if tokens is not None:
            self.forced_tokens[: tokens.shape[0], : tokens.shape[1]] = tokens

    def mask_keys(self, key_mask: Tensor | None, images: int) -> None:
        """The mask (images or 2 * images, n) of [conditional; unconditional] rows."""
        self.key_mask.fill_(True)
        if key_mask is not None:
            size = len(self.x)
            for half, rows in enumerate(key_mask.split(images)):
                self.key_mask[half * size : half * size + images, : rows.shape[1]] = rows
        self.first_key.copy_(self.key_mask.int().argmax(dim=1))

    def seed(self, noise: ImageNoise) -> None:
        """Take the noise from where it stands."""
        self.seeds[: len(noise.seeds)] = noise.seeds
        self.noise_from.fill_(noise.position)


class StaticEngine(Engine):
    """Compiled blocks and, on a GPU, recorded steps; caches always have room for a whole image.

    Samples with counted noise (`ImageNoise`) or greedily; with other generators it computes as the plain engine does.
    `quantize` "int8" holds the matrices as int8 and computes in the model's format. The model itself is left as it is.
    `compile_blocks` False leaves the blocks as they are. `ready_seconds` counts what preparing steps has taken so far.
    """

    name = "compiled"

    def __init__(self, model: Transformer, quantize: str = "none", compile_blocks: bool = True) -> None:
        super().__init__(int8_copy(model) if quantize == "int8" else sharing_copy(model))
        self.ready_seconds = 0.0
        self._buffers: dict[int, DecodeBuffers] = {}
        self._steps: dict[GraphKey, Step] = {}
        self._fixed: dict[tuple[int, int], FixedCache] = {}
        on_gpu = self.model.tok_embeddings.weight.device.type == "cuda"
        self._graphs: CudaGraphs | None = CudaGraphs() if on_gpu else None
        if compile_blocks:
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
            for layer in self.model.layers:
                layer.compile()

    @property
    def positions(self) -> int:
        """Positions of the condition and of a whole image."""
        return self.model.cls_token_num + self.model.block_size

    def new_cache(
        self, rows: int, positions: int, dtype: torch.dtype, device: torch.device, key_mask: Tensor | None
    ) -> DecodeCache:
        """Empty caches for whole images of a padded batch; graphs live as long as these are large enough."""
        rows = 2 * padded_batch(-(-rows // 2))
        if self._cache is None or not self._cache.fits(rows, self.positions, dtype, device):
            self._cache = None
            self._forget_steps()
        return super().new_cache(rows, self.positions, dtype, device, key_mask)

    def _forget_steps(self) -> None:
        self._steps.clear(), self._fixed.clear()
        if self._graphs is not None:
            self._graphs.forget()

    def warm_up(self, images: int = 1, **options: Any) -> None:
        """Prepare the steps of batches of `images` sampled with `options` of `generate`."""
        device = self.model.tok_embeddings.weight.device
        if self.model.model_type == "c2i":
            cond, mask = torch.zeros(images, dtype=torch.int64, device=device), None
        else:
            width = self.model.config.caption_dim
            cond = torch.zeros(images, self.model.cls_token_num, width, device=device)
            mask = torch.ones(cond.shape[:2], dtype=torch.int64, device=device)
        generate(self, cond, 2, mask, generators=ImageNoise(range(images), device), **options)

    def decode_n_tokens(
        self,
        cur_token: Tensor,
        input_pos: Tensor,
        num_new_tokens: int,
        *,
        scales: list[float],
        heat: list[float],
        cache: DecodeCache,
        given: Tensor | None = None,
        on_token: OnToken | None = None,
        out: Tensor | None = None,
        generators: Any = None,
        **sampling: Any,
    ) -> Tensor:
        """As `generate.decode_n_tokens`, one replay per token; `on_token` follows the device by at most 32 steps."""
        if out is None:
            out = cur_token.new_empty(len(cur_token), num_new_tokens)
        sampled = sampling.get("sample_logits", True)
        if num_new_tokens == 0 or (sampled and not isinstance(generators, ImageNoise)):
            return decode_n_tokens(
                self, cur_token, input_pos, num_new_tokens, 1.0, -1, scales=scales, heat=heat, cache=cache,
                given=given, on_token=on_token, out=out, generators=generators, **sampling,
            )  # fmt: skip
        images, first, uncond_steps = len(cur_token), cache.length, null_rows_needed(scales[:num_new_tokens])
        buffers = self._buffers_for(images, cur_token.device)
        buffers.start(cur_token, input_pos, scales[:num_new_tokens], heat[:num_new_tokens])
        buffers.force(given)
        buffers.mask_keys(cache.key_mask, images)
        if sampled:
            buffers.seed(generators)
            generators.position += num_new_tokens
        if uncond_steps:
            _move_uncond_rows(cache, images, len(buffers.x))
        options, pace = tuple(sorted(sampling.items())), Pace(cur_token.device)
        masked = cache.key_mask is not None
        for step in range(num_new_tokens):
            keys = self._keys(first + step + 1)
            self._step(GraphKey(len(buffers.x), step < uncond_steps, keys, masked, options), buffers)()
            if on_token is not None:
                out[:, step] = buffers.tokens[:images, step]
                pace()
                on_token(step + 1)
        cache.length = first + num_new_tokens
        return out.copy_(buffers.tokens[:images, :num_new_tokens])

    def _keys(self, filled: int) -> int:
        """The number of positions that attention reads where `filled` are."""
        return min(-(-filled // _BUCKET) * _BUCKET, self.positions)

    def _buffers_for(self, images: int, device: torch.device) -> DecodeBuffers:
        size = padded_batch(images)
        if size not in self._buffers:
            self._buffers[size] = DecodeBuffers.allocate(size, self.model.block_size, self.positions, device)
        return self._buffers[size]

    def _step(self, key: GraphKey, buffers: DecodeBuffers) -> Step:
        """What runs one step of this kind: a graph on a GPU, else the step itself."""
        if key not in self._steps:
            if len(self._steps) == _MOST_GRAPHS:
                self._forget_steps()
            started = time.perf_counter()
            self._steps[key] = self._prepare(key, buffers)
            self.ready_seconds += time.perf_counter() - started
        return self._steps[key]

    def _prepare(self, key: GraphKey, buffers: DecodeBuffers) -> Step:
        rows = key.images * (2 if key.with_uncond else 1)
        if (rows, key.keys) not in self._fixed:
            self._fixed[rows, key.keys] = self._cache.fixed(rows, key.keys)  # type: ignore[union-attr]
        cache = self._fixed[rows, key.keys]

        def step() -> None:
            self.advance(key, buffers, cache)

        if self._graphs is None:
            return step
        before = buffers.x.clone(), buffers.position.clone(), buffers.index.clone()

        def rewind() -> None:
            buffers.x.copy_(before[0]), buffers.position.copy_(before[1]), buffers.index.copy_(before[2])

        return self._graphs.record(step, rewind)

    def advance(self, key: GraphKey, buffers: DecodeBuffers, cache: FixedCache) -> None:
        """One step: feed buffers.x, sample, write down, move on. Only tensors change."""
        x = torch.cat([buffers.x, buffers.x]) if key.with_uncond else buffers.x
        keys = torch.arange(key.keys, device=x.device)
        mask = (keys <= buffers.position)[None, None, None]
        if key.masked:
            own = buffers.key_mask[: len(x), None, None, : key.keys]
            mask = (mask & own) | (keys == buffers.position)
        logits, _ = self.model(x, None, buffers.position, mask=mask, cache=cache)
        logits = logits[:, -1]
        if key.with_uncond:
            cond, uncond = logits.chunk(2)
            scale = buffers.scales[buffers.index]
            logits = torch.where(scale > 1, uncond + scale * (cond - uncond), cond)
        sampled = self._sample(logits / buffers.temperatures[buffers.index], buffers, dict(key.sampling))
        forced = buffers.forced_tokens.gather(1, buffers.index.expand(len(sampled), 1))
        sampled = torch.where(forced < 0, sampled, forced)
        buffers.tokens.scatter_(1, buffers.index.expand(len(sampled), 1), sampled)
        buffers.x.copy_(sampled)
        buffers.position.add_(1)
        buffers.index.add_(1)

    @staticmethod
    def _sample(logits: Tensor, buffers: DecodeBuffers, sampling: dict[str, Any]) -> Tensor:
        """Tokens int64 (B, 1) of logits (B, V) that are divided by the temperature already."""
        if not sampling.pop("sample_logits", True):
            return logits.argmax(dim=-1, keepdim=True)
        probs = logits_to_probs(logits, **sampling)
        noise = exponential_noise(buffers.seeds, buffers.noise_from + buffers.index, logits.shape[-1])
        return (probs / noise).argmax(dim=-1, keepdim=True)


def _move_uncond_rows(cache: DecodeCache, images: int, size: int) -> None:
    """Move the unconditional rows behind a batch that is filled up from `images` to `size`."""
    if images == size:
        return
    for layer in cache.layers:
        for buffer in layer.buffers():  # keys and values, and their scales if they have any
            filled = buffer[:, :, : cache.length]
            filled[size : size + images] = filled[images : 2 * images].clone()
