"""The decoding step in C++, for CPUs: float32 or bfloat16 with the numerics of the model, or int8 weights."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from autoregressive.engine import compiler
from autoregressive.engine.memory import Arena
from autoregressive.engine.packing import (
    LANES,
    PER_WORD,
    Matrix,
    Packed,
    interleave,
    pack_keys,
    pack_matrix,
    pack_values,
    quantize_rows,
    round_up,
)
from autoregressive.models.cache import DecodeCache
from autoregressive.models.engine import Engine
from autoregressive.models.gpt import Transformer
from autoregressive.models.guidance import guided_logits
from autoregressive.models.noise import ImageNoise


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("qkv", "out", "gate", "down")),
        ("attention_norm", ctypes.c_void_p),
        ("ffn_norm", ctypes.c_void_p),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("dim", "layers", "heads", "kv_heads", "head_dim", "hidden", "vocab")),
        ("eps", ctypes.c_float),
        ("int8", ctypes.c_int32),
        ("rounded", ctypes.c_int32),
        ("layer", ctypes.POINTER(_Layer)),
        ("head", Matrix),
        ("norm", ctypes.c_void_p),
        ("rotary", ctypes.c_void_p),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("rows", "position", "threads", "capacity_rows", "capacity_positions")),
        *((n, ctypes.c_int64) for n in ("width", "bias_length")),
        *((n, ctypes.c_void_p) for n in ("h", "wide", "packed", "row_scale", "keys", "values")),
        *((n, ctypes.c_void_p) for n in ("key_scale", "value_scale", "bias", "logits")),
    ]


class PackedModel:
    """All weights of a model in the order of the C++ step; `structure` points into them."""

    def __init__(self, model: Transformer, quantize: str) -> None:
        config = model.config
        self.activation_dtype = model.tok_embeddings.weight.dtype
        weight_dtype = torch.int8 if quantize == "int8" else self.activation_dtype
        self._kept: list[Any] = []
        arena = Arena()
        self.weight_bytes = 0

        def matrix(packed: Packed) -> Matrix:
            packed.data = arena.store(packed.data)
            self._kept.append(packed)
            self.weight_bytes += packed.nbytes
            return packed.structure()

        def vector(values: Tensor) -> int:
            self._kept.append(values.detach().float().contiguous())
            return self._kept[-1].data_ptr()

        def pack(linear: torch.nn.Linear) -> Packed:
            return pack_matrix(linear.weight.detach(), weight_dtype)

        self._layers = (_Layer * config.n_layer)()
        for structure, block in zip(self._layers, model.layers):
            attention, feed_forward = block.attention, block.feed_forward
            structure.qkv, structure.out = matrix(pack(attention.wqkv)), matrix(pack(attention.wo))
            structure.gate = matrix(interleave(pack(feed_forward.w1), pack(feed_forward.w3)))
            structure.down = matrix(pack(feed_forward.w2))
            structure.attention_norm = vector(block.attention_norm.weight)
            structure.ffn_norm = vector(block.ffn_norm.weight)
        qkv_width = (config.n_head + 2 * config.kv_heads) * config.head_dim
        self.width = round_up(max(qkv_width, config.ffn_hidden, config.dim), 2 * LANES) + LANES
        self.structure = _Model(
            config.dim, config.n_layer, config.n_head, config.kv_heads, config.head_dim, config.ffn_hidden,
            config.vocab_size, config.norm_eps, weight_dtype == torch.int8, self.activation_dtype == torch.bfloat16,
            ctypes.cast(self._layers, ctypes.POINTER(_Layer)), matrix(pack(model.output)), vector(model.norm.weight),
            vector(model.freqs_cis),
        )  # fmt: skip


class NativeCache:
    """Keys, values and work space of the C++ step for up to `rows` sequences of `positions`.

    Keys and values are float32, bfloat16 or int8 (`dtype`). With int8 each of them has a float32 scale: `key_scale` and
    `value_scale` (n_layer, rows, kv_heads, positions), which are None otherwise.
    """

    def __init__(self, model: Transformer, packed: PackedModel, rows: int, positions: int, dtype: torch.dtype) -> None:
        config = model.config
        self.rows, self.positions, self.length = rows, round_up(positions, LANES), 0
        per, heads = PER_WORD[dtype], (config.n_layer, rows, config.kv_heads)
        blocks = -(-config.head_dim // LANES)
        arena = Arena()
        self.keys = arena.zeros((*heads, self.positions // LANES, config.head_dim // per, LANES))
        self.values = arena.zeros((*heads, self.positions // per, blocks, LANES))
        self.key_scale: Tensor | None = None
        self.value_scale: Tensor | None = None
        if dtype == torch.int8:
            self.key_scale, self.value_scale = (
                arena.zeros((*heads, self.positions)).view(torch.float32) for _ in range(2)
            )
        self.h = torch.empty(rows, config.dim)
        self.wide, self.packed = torch.zeros(rows, packed.width), torch.zeros(rows, packed.width)
        self.row_scale = torch.empty(rows)
        self.bias: Tensor | None = None

    def take(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (rows, kv_heads, P, head_dim) of the first P positions."""
        if self.key_scale is not None and self.value_scale is not None:
            (keys, key_scale), (values, value_scale) = quantize_rows(keys), quantize_rows(values)
            self._put(self.key_scale[layer], key_scale)
            self._put(self.value_scale[layer], value_scale)
        self._put(self.keys[layer], pack_keys(keys))
        self._put(self.values[layer], pack_values(values))

    @staticmethod
    def _put(store: Tensor, new: Tensor) -> None:
        store[: new.shape[0], :, : new.shape[2]] = new


class NativeEngine(Engine):
    """Computes single tokens in C++; conditions of several positions are computed by the model.

    `quantize` "int8" holds the matrices as int8 with a scale per output, and multiplies them with activations that are
    rounded to int8 with a scale per row. `kv_cache_dtype` "int8" holds keys and values as int8 with a float32 scale for
    each (row, key head, position), about a quarter of the bytes of float32 and half of bfloat16, and multiplies them
    with float32 queries and softmax weights; "auto" keeps the model's format.

    Raises:
        ValueError: a model that is not on the CPU, or not float32 or bfloat16; another `kv_cache_dtype`.
        CannotCompile: no compiler.
    """

    name = "native"

    def __init__(
        self,
        model: Transformer,
        quantize: str = "none",
        machine: tuple[str, ...] = compiler.NATIVE,
        kv_cache_dtype: str = "auto",
    ) -> None:
        super().__init__(model)
        if reason := unsupported(model):
            raise ValueError(reason)
        if kv_cache_dtype not in ("auto", "int8"):
            raise ValueError(f"the native engine's kv_cache_dtype is auto or int8, not {kv_cache_dtype!r}")
        self.quantize, self.kv_cache_dtype = quantize, kv_cache_dtype
        self._library, self.compile_seconds = compiler.load(machine)
        self._packed: PackedModel | None = None
        self._packed_from: tuple[tuple[int, int], ...] = ()
        self._native_cache: NativeCache | None = None

    def warm_up(self, images: int = 1, **options: Any) -> None:
        """Pack the weights, whatever the batch will be."""
        _ = self.packed

    @property
    def packed(self) -> PackedModel:
        """The packed weights, made anew when the model's own have changed."""
        stamp = tuple((p.data_ptr(), p._version) for p in self.model.parameters())
        if self._packed is None or stamp != self._packed_from:
            self._packed = self._native_cache = None
            self._packed, self._packed_from = PackedModel(self.model, self.quantize), stamp
        return self._packed

    def new_cache(
        self, rows: int, positions: int, dtype: torch.dtype, device: torch.device, key_mask: Tensor | None
    ) -> NativeCache:
        """Empty caches, those of the last call if they are large enough."""
        packed, cache = self.packed, self._native_cache
        if cache is None or cache.rows < rows or cache.positions < positions:
            self._native_cache = None
            stored = torch.int8 if self.kv_cache_dtype == "int8" else packed.activation_dtype
            cache = self._native_cache = NativeCache(self.model, packed, rows, positions, stored)
        cache.length, cache.bias = 0, None
        if key_mask is not None:
            prefix = key_mask[:, : self.model.cls_token_num]
            cache.bias = torch.zeros(prefix.shape).masked_fill_(~prefix, -torch.inf)
        return cache

    def __call__(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor,
        *,
        cache: NativeCache,
        last_only: bool = False,
    ) -> tuple[Tensor, None]:
        if idx is not None:
            return self._step(self.model.tok_embeddings(idx)[:, 0], cache), None
        if self.model.model_type == "c2i":
            return self._step(self.model.cls_embedding(cond_idx, train=False)[:, 0], cache), None
        return self._read_condition(cond_idx, cache), None

    def _read_condition(self, cond: Tensor, cache: NativeCache) -> Tensor:
        """Logits (rows, 1, V) after a condition of several positions, whose keys and values go into `cache`."""
        model, rows, prefix = self.model, cond.shape[0], self.model.cls_token_num
        mask = None if cache.bias is None else cache.bias == 0
        own = DecodeCache.allocate(model.config, rows, prefix, self.packed.activation_dtype, cond.device, mask)
        logits, _ = model(None, cond, torch.arange(prefix), cache=own, last_only=True)
        for i, layer in enumerate(own.layers):
            cache.take(i, layer.k_cache, layer.v_cache)
        cache.length = prefix
        return logits

    def _step(self, h: Tensor, cache: NativeCache) -> Tensor:
        """Float32 logits (rows, 1, V) after the input `h` (rows, dim) at the next position."""
        packed, rows = self._packed, h.shape[0]
        assert packed is not None
        if cache.length >= cache.positions or rows > cache.rows:
            raise ValueError(f"the cache has {cache.positions} positions, too few for {cache.length + 1}")
        cache.h[:rows] = h
        logits = torch.empty(rows, 1, self.model.vocab_size)
        bias = cache.bias
        tensors = (
            cache.h, cache.wide, cache.packed, cache.row_scale, cache.keys, cache.values, cache.key_scale,
            cache.value_scale, bias, logits,
        )  # fmt: skip
        step = _Step(
            rows, cache.length, torch.get_num_threads(), cache.rows, cache.positions, packed.width,
            0 if bias is None else bias.shape[1], *(None if t is None else t.data_ptr() for t in tensors),
        )  # fmt: skip
        self._library.decode_step(ctypes.byref(packed.structure), ctypes.byref(step))
        cache.length += 1
        return logits

    def guide(self, logits: Tensor, cfg_scale: float) -> Tensor:
        """As `guided_logits`, without waking PyTorch's threads: on a small machine they get in the way of ours."""
        if cfg_scale == 1 or logits.shape[1] != 1:
            return guided_logits(logits, cfg_scale)
        cond, uncond = logits.contiguous().chunk(2)
        out = torch.empty_like(cond)
        self._library.guide(
            ctypes.c_void_p(cond.data_ptr()), ctypes.c_void_p(uncond.data_ptr()), ctypes.c_float(cfg_scale),
            ctypes.c_int64(out.numel()), ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out

    def sample(self, logits: Tensor, **sampling: Any) -> tuple[Tensor, Tensor | None]:
        """As `sampling.sample`; the common case is drawn in C++, without the probabilities."""
        if not _drawn_natively(**sampling):
            return super().sample(logits, **sampling)
        noise = sampling.get("generators")
        last = logits[:, -1].contiguous()
        if noise is not None and len(noise) != len(last):
            raise ValueError(f"expected one generator per image, got {len(noise)} for {len(last)} images")
        tokens = torch.empty(len(last), 1, dtype=torch.int64)
        drawn = sampling.get("sample_logits", True)
        self._library.draw_tokens(
            ctypes.c_void_p(last.data_ptr()), ctypes.c_int64(last.shape[0]), ctypes.c_int64(last.shape[1]),
            ctypes.c_float(max(sampling.get("temperature", 1.0), 1e-5)), ctypes.c_int64(sampling.get("top_k") or 0),
            ctypes.c_void_p(noise.seeds.data_ptr() if drawn else None),
            ctypes.c_int64(noise.advance() if drawn else 0), ctypes.c_int64(torch.get_num_threads()),
            ctypes.c_void_p(tokens.data_ptr()),
        )  # fmt: skip
        return tokens, None


def _drawn_natively(
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    generators: Any = None,
    **others: Any,
) -> bool:
    """Whether the C++ sampler knows these options: the best token, or temperature and top-k with counted noise."""
    plain = not any(others.values())
    return plain and (not sample_logits or (top_p >= 1.0 and isinstance(generators, ImageNoise)))


def unsupported(model: Transformer) -> str | None:
    """Why the C++ step cannot compute this model, or None."""
    weight = model.tok_embeddings.weight
    if weight.device.type != "cpu":
        return f"the native engine computes on the CPU; the model is on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the native engine computes in float32 or bfloat16, not in {weight.dtype}"
    return None
