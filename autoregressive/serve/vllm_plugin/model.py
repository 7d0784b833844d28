"""The GPT in vLLM's layers. Tensors are token-major: T tokens of S streams are T * S rows, S = 2 with guidance."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.sequence import IntermediateTensors

from autoregressive.models.condition import caption_projection
from autoregressive.models.config import ModelArgs
from autoregressive.models.rope import precompute_freqs_cis_2d
from autoregressive.serve.vllm_plugin import LOGITS_PROCESSOR
from autoregressive.serve.vllm_plugin.config import LlamaGenConfig
from autoregressive.serve.vllm_plugin.guidance import null_logits_of


class GridRotary(RotaryEmbedding):
    """The two-dimensional table of the GPT for vLLM's kernel; rows of the condition are zero.

    `head_size` may be padded: the table, and so the rotation, is as wide as the GPT's own heads.
    """

    def __init__(self, args: ModelArgs, head_size: int, dtype: torch.dtype) -> None:
        self._args = args
        positions = args.cls_token_num + args.block_size
        super().__init__(head_size, args.head_dim, positions, args.rope_base, is_neox_style=False, dtype=dtype)

    def _compute_cos_sin_cache(self) -> Tensor:
        args = self._args
        table = precompute_freqs_cis_2d(args.grid_size, args.head_dim, args.rope_base, args.cls_token_num)
        return torch.cat(table.unbind(-1), dim=-1)


class TwinAttention(nn.Module):
    """Attention of all streams at once: each has its own share of the heads of one vLLM layer."""

    def __init__(self, config: LlamaGenConfig, rotary: GridRotary, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        args, self.streams, width = config.gpt_args, config.streams, config.head_dim
        quant, shards = vllm_config.quant_config, get_tensor_model_parallel_world_size()
        heads, kv_heads = args.n_head // shards, max(args.kv_heads // shards, 1)
        self.widths = [heads * width, kv_heads * width, kv_heads * width]
        self.qkv = QKVParallelLinear(
            args.dim, width, args.n_head, args.kv_heads, bias=False, quant_config=quant, prefix=f"{prefix}.qkv"
        )
        self.out = RowParallelLinear(
            args.n_head * width, args.dim, bias=False, quant_config=quant, prefix=f"{prefix}.out"
        )
        self.rotary = rotary
        self.attention = Attention(
            heads * self.streams,
            width,
            args.head_dim**-0.5,
            num_kv_heads=kv_heads * self.streams,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attention",
        )

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(T * S, dim) to (T * S, dim); `positions` (T,)."""
        tokens = positions.shape[0]
        q, k, v = (part.reshape(tokens, -1) for part in self.qkv(x)[0].split(self.widths, dim=-1))
        q, k = self.rotary(positions, q, k)
        heads = self.attention(q, k, v)
        return self.out(heads.reshape(tokens * self.streams, -1))[0]


class TwinBlock(nn.Module):
    """One block; `residual` is what the branch is yet to be added to."""

    def __init__(self, config: LlamaGenConfig, rotary: GridRotary, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        args, quant = config.gpt_args, vllm_config.quant_config
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = TwinAttention(config, rotary, vllm_config, f"{prefix}.attention")
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.gate_up = MergedColumnParallelLinear(
            args.dim, [args.ffn_hidden] * 2, bias=False, quant_config=quant, prefix=f"{prefix}.gate_up"
        )
        self.activation = SiluAndMul()
        self.down = RowParallelLinear(
            args.ffn_hidden, args.dim, bias=False, quant_config=quant, prefix=f"{prefix}.down"
        )

    def forward(self, x: Tensor, residual: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Branch and residual (T * S, dim), both updated."""
        if residual is None:
            x, residual = self.attention_norm(x), x
        else:
            x, residual = self.attention_norm(x, residual)
        x, residual = self.ffn_norm(self.attention(x, positions), residual)
        return self.down(self.activation(self.gate_up(x)[0]))[0], residual


@support_torch_compile(dynamic_arg_dims={"embeddings": 0, "positions": 0})
class TwinBlocks(nn.Module):
    """Everything between the embeddings and the head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LlamaGenConfig = vllm_config.model_config.hf_config
        args = config.gpt_args
        self.streams, self.condition, self.interval = config.streams, args.cls_token_num, config.cfg_interval
        rotary = GridRotary(args, config.head_dim, vllm_config.model_config.dtype)
        self.null = nn.Parameter(torch.zeros(args.cls_token_num, args.dim), requires_grad=False)
        self.layers = nn.ModuleList(
            TwinBlock(config, rotary, vllm_config, f"{prefix}.layers.{i}") for i in range(args.n_layer)
        )
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Embedded tokens (T, dim) at `positions` (T,) to normed hidden rows (T, S * dim), [cond | null]."""
        rows = self._twins(embeddings, positions)
        residual = None
        for layer in self.layers:
            rows, residual = layer(rows, residual, positions)
        hidden = self.norm(rows, residual)[0].reshape(positions.shape[0], -1)
        if self.streams == 2 and self.interval > -1:
            hidden = self._unguided_after_interval(hidden, positions)
        return hidden

    def _twins(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Each token, and beside it the same token without its condition: (T * S, dim)."""
        if self.streams == 1:
            return embeddings
        empty = self.null[positions.clamp(0, self.condition - 1)]
        null = torch.where((positions < self.condition)[:, None], empty, embeddings)
        return torch.stack([embeddings, null], dim=1).flatten(0, 1)

    def _unguided_after_interval(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The conditional row in place of the unconditional one where no guidance is wanted: mixing then keeps it."""
        cond, null = hidden.chunk(2, dim=-1)
        late = (positions - self.condition > self.interval)[:, None]
        return torch.cat([cond, torch.where(late, cond, null)], dim=-1)


class LlamaGenForImageGeneration(nn.Module):
    """What vLLM makes of an exported folder.

    Prompts: of a class the one token ``vocab_size + class``; of a text n projected caption features, as embeddings.
    """

    supports_mrope = True  # only configurations with an mrope_section (texts) make use of it

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LlamaGenConfig = vllm_config.model_config.hf_config
        if LOGITS_PROCESSOR not in (vllm_config.model_config.logits_processors or []):
            raise ValueError(f"without guidance the images are not right: add --logits-processors {LOGITS_PROCESSOR}")
        self.args, self.streams = config.gpt_args, config.streams
        self.tokens = nn.Embedding(self.args.vocab_size + self._classes, self.args.dim)
        self.blocks = TwinBlocks(vllm_config=vllm_config, prefix=f"{prefix}.blocks" if prefix else "blocks")
        self.head = ParallelLMHead(self.args.vocab_size, self.args.dim, prefix=f"{prefix}.head")
        self.logits = LogitsProcessor(self.args.vocab_size)
        self._null_logits = null_logits_of(vllm_config)

    @property
    def _classes(self) -> int:
        if self.args.model_type == "t2i":
            return 0
        return self.args.num_classes + int(self.args.class_dropout_prob > 0)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Codes and classes (T,) to (T, dim). A number that is neither must not stop the engine for everybody."""
        return self.tokens(input_ids.clamp(0, self.tokens.num_embeddings - 1))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden rows (T, S * dim) of tokens (T,) or embeddings; `positions` (T,), for texts (3, T) of equal rows."""
        embeddings = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.blocks(embeddings, positions[0] if positions.ndim == 2 else positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Conditional logits (B, V) of hidden rows (B, S * dim); the unconditional ones wait for `GuidedDrawing`."""
        if self.streams == 1:
            return self._logits_of(hidden_states)
        cond, null = hidden_states.chunk(2, dim=-1)
        self._null_logits.rows = self._logits_of(null.contiguous())
        return self._logits_of(cond.contiguous())

    def _logits_of(self, hidden: Tensor) -> Tensor | None:
        logits = self.logits(self.head, hidden)
        return None if logits is None else logits.float()

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Positions (3, n) of a prompt of n: the last n of the condition; and how far all later ones are shifted."""
        shift = self.args.cls_token_num - len(input_tokens)
        return (torch.arange(len(input_tokens)) + shift).expand(3, -1), shift

    @staticmethod
    def get_model_state_cls() -> type:
        """Model runner V2 asks for it (see `runner_v2`)."""
        from autoregressive.serve.vllm_plugin.runner_v2 import TextPositions

        return TextPositions

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take over a GPT's state dict; returns the names of the parameters that have been filled."""
        state = dict(weights)
        own = dict(self.named_parameters())
        self._load_embeddings(own, state)
        for i in range(self.args.n_layer):
            self._load_block(own, state, i)
        own["blocks.norm.weight"].data.copy_(state["norm.weight"])
        own["head.weight"].weight_loader(own["head.weight"], state["output.weight"])
        return set(own)

    def _load_embeddings(self, own: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
        tokens, null = own["tokens.weight"].data, own["blocks.null"].data
        tokens[: self.args.vocab_size] = state["tok_embeddings.weight"]
        if self.args.model_type == "c2i":
            tokens[self.args.vocab_size :] = state["cls_embedding.embedding_table.weight"]
            if self.streams == 2:
                null[:] = tokens[-1]
            return
        empty = state["cls_embedding.uncond_embedding"][-self.args.cls_token_num :]
        null[:] = caption_projection(state)(empty)

    def _load_block(self, own: dict[str, nn.Parameter], state: dict[str, Tensor], number: int) -> None:
        there, here = f"layers.{number}", f"blocks.layers.{number}"
        width, padded = self.args.head_dim, self.blocks.layers[number].attention.rotary.head_size
        counts = [self.args.n_head, self.args.kv_heads, self.args.kv_heads]
        qkv = own[f"{here}.attention.qkv.weight"]
        heads = state[f"{there}.attention.wqkv.weight"].unflatten(0, (-1, width))
        for name, part in zip("qkv", F.pad(heads, (0, 0, 0, padded - width)).split(counts)):
            qkv.weight_loader(qkv, part.flatten(0, 1), name)
        out = own[f"{here}.attention.out.weight"]
        columns = state[f"{there}.attention.wo.weight"].unflatten(1, (-1, width))
        out.weight_loader(out, F.pad(columns, (0, padded - width)).flatten(1))
        gate_up = own[f"{here}.gate_up.weight"]
        for shard, name in enumerate(("w1", "w3")):
            gate_up.weight_loader(gate_up, state[f"{there}.feed_forward.{name}.weight"], shard)
        down = own[f"{here}.down.weight"]
        down.weight_loader(down, state[f"{there}.feed_forward.w2.weight"])
        for name in ("attention_norm", "ffn_norm"):
            own[f"{here}.{name}.weight"].data.copy_(state[f"{there}.{name}.weight"])
