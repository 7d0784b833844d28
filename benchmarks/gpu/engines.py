"""Engines on this device: the tokens of the bundled emoji models against the eager engine on the CPU.

In float32 every engine must give the same images, in any batch, and change batch sizes without losing its CUDA graphs.
In bfloat16 and int8 the share of codes and images that change is reported.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoregressive.build import load_gpt
from autoregressive.engine.build import ENGINES, make_engine
from autoregressive.engine.static import StaticEngine
from autoregressive.models.engine import Engine
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.noise import ImageNoise, exponential_noise, philox
from autoregressive.serve.cards import bundled_cards, with_values
from benchmarks.gpu.context import Context
from benchmarks.gpu.goldens import exact_float32
from utils import checkpoint

CODEBOOK = 512  # of the bundled tokenizer
FILTERED = {"top_p": 0.9, "min_p": 0.02, "temperature_end": 0.6, "cfg_schedule": "linear", "cfg_interval": 8}
BATCHES = (range(8), range(8, 11), range(8, 16), range(4), range(1), range(5, 6))  # each after the one before it
RESERVE_S = 8.0  # seconds before the section's end after which no further batch begins
WITHOUT_GRAPH = "without a CUDA graph"


@dataclass(frozen=True)
class Task:
    """What is sampled: a model on the CPU in float32, its conditions, and the eager tokens int32 (images, count).

    `masks` int64 (images, T) are those of captions, None for classes. `options` are those of `generate`. The whole
    image is 64 tokens; `count` of them are sampled.
    """

    model: Transformer
    cond: Tensor
    masks: Tensor | None
    options: dict[str, Any]
    count: int
    tokens: Tensor

    def sample(self, engine: Engine, images: Sequence[int]) -> Tensor:
        """The tokens of these images, sampled where the engine's model is; int32 (len(images), count) on the CPU."""
        rows, device = list(images), engine.tok_embeddings.weight.device
        masks = None if self.masks is None else self.masks[rows].to(device)
        noise = ImageNoise([1000 + i for i in rows], device)
        cond = self.cond[rows].to(device)
        return generate(engine, cond, self.count, masks, generators=noise, **self.options).cpu()

    def with_tokens(self) -> Task:
        """The same with what the eager engine samples on the CPU as its tokens."""
        return replace(self, tokens=self.sample(Engine(self.model), range(len(self.cond))))


def run(context: Context) -> None:
    """Compare noise, then each engine in float32, bfloat16 and int8; the one that compiles for long comes last."""
    names, tasks = engine_names(context), {}
    with exact_float32():
        with context.attempt("noise"):
            check_noise(context)
        with context.attempt("reference"):
            tasks = make_tasks(*((3, 12) if context.tiny else (16, 64)))
        int8: dict[str, Tensor] = {}
        for name in names if tasks else ():
            for label, task in tasks.items():
                with context.attempt(f"{name}: {label}"):
                    check_engine(context, f"{name}: {label}", task, name)
            with context.attempt(f"{name}: bfloat16"):
                compare_bfloat16(context, tasks["classes"], name)
            with context.attempt(f"{name}: int8"):
                compare_int8(context, tasks["classes"], name, int8)


def engine_names(context: Context) -> list[str]:
    """The engines that run on this device; a GPU engine that cannot is recorded as skipped."""
    names = ["eager", "compiled"]
    if context.device.type != "cuda":
        context.record("triton", skipped="needs a GPU")
    elif "triton" not in ENGINES:
        context.record("triton", skipped="make_engine has no engine of this name")
    else:
        names.insert(1, "triton")
    return names


def build_engine(context: Context, task: Task, name: str, quantize: str = "none", **to: Any) -> Engine:
    """The engine over a copy of the model on the device; in the tiny program without the minutes of compiling."""
    model = copy.deepcopy(task.model).to(device=context.device, **to)
    if name == "compiled" and context.tiny:
        return StaticEngine(model, quantize, compile_blocks=False)
    return make_engine(model, name, quantize)


def make_tasks(images: int, count: int) -> dict[str, Task]:
    """Tasks of `images` and `count` tokens: classes; captions of 1 to 16 positions; classes with every filter."""
    made = {}
    for card in bundled_cards():
        weights = checkpoint.read(card.args.gpt_ckpt)
        projection = weights.get("cls_embedding.cap_proj.fc1.weight")
        width = card.args.caption_dim if projection is None else projection.shape[1]
        args = with_values(card, {"caption_dim": width}).args
        model = load_gpt(args, CODEBOOK, torch.device("cpu"))
        cond, masks = torch.arange(images) * 7 % args.num_classes, None
        if card.kind == "t2i":
            cond, masks = random_captions(images, args.cls_token_num, width)
        options = {"cfg_scale": args.cfg_scale, "temperature": args.temperature, "top_k": args.top_k}
        label = {"c2i": "classes", "t2i": "captions"}[card.kind]
        made[label] = Task(model, cond, masks, options, count, torch.empty(0)).with_tokens()
    classes = made["classes"]
    made["filtered"] = replace(classes, options={**classes.options, **FILTERED}).with_tokens()
    return made


def random_captions(count: int, positions: int, width: int) -> tuple[Tensor, Tensor]:
    """Left-padded unit features float32 (count, positions, width) of 1, 2, ... tokens, and masks int64."""
    features = torch.randn(count, positions, width, generator=torch.Generator().manual_seed(0))
    features = features / features.norm(dim=-1, keepdim=True)
    mask = torch.arange(positions) >= positions - (1 + torch.arange(count) % positions)[:, None]
    return features * mask[..., None], mask.long()


def check_engine(context: Context, label: str, task: Task, name: str) -> None:
    """All images at once, then in batches of other sizes one after another: always the tokens of the CPU."""
    if not context.has_time(label, RESERVE_S):
        return
    with log_messages() as messages:
        engine = build_engine(context, task, name)
        whole = task.sample(engine, range(len(task.tokens)))
        context.check(f"{label}: tokens of the CPU", torch.equal(whole, task.tokens), **changes(whole, task.tokens))
        wrong, sizes = [], []
        for batch in BATCHES:
            rows = [i for i in batch if i < len(task.tokens)]
            if not rows or context.seconds_left < RESERVE_S:
                continue
            sizes.append(len(rows))
            if not torch.equal(task.sample(engine, rows), whole[rows]):
                wrong.append(rows)
        if sizes:
            context.check(f"{label}: any batch", not wrong, sizes=[len(whole), *sizes], images_that_differ=wrong)
        else:
            context.record(f"{label}: any batch", skipped="no time was left")
    lost = [message for message in messages if WITHOUT_GRAPH in message]
    context.check(f"{label}: graphs", not lost, warnings=messages, ready_s=getattr(engine, "ready_seconds", 0.0))


@contextmanager
def log_messages() -> Iterator[list[str]]:
    """The warnings of the project's logger inside the block, one text each."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("llamagen")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def changes(tokens: Tensor, expected: Tensor) -> dict[str, float]:
    """Which share of images and of codes differs between tokens (B, N), and how many codes in are the first ones.

    `first_changed_code` is the mean position over the images that differ; N where none does.
    """
    differs = tokens != expected
    changed = differs.any(dim=1)
    first = differs.int().argmax(dim=1)[changed].float()
    return {
        "share_of_images_changed": float(changed.float().mean()),
        "share_of_codes_changed": float(differs.float().mean()),
        "first_changed_code": float(first.mean()) if len(first) else float(tokens.shape[1]),
    }


def check_noise(context: Context) -> None:
    """Philox words are equal on both devices; the logarithm of the noise differs in its last places at most."""
    seeds = torch.randint(2**62, (8,), generator=torch.Generator().manual_seed(0))
    count = 256 if context.tiny else 16384
    noise, words = zip(*(_noise_and_words(seeds.to(device), count) for device in ("cpu", context.device)))
    context.check("noise words equal", torch.equal(words[0], words[1].cpu()), words=words[0].numel())
    ulps = (noise[0].view(torch.int32).long() - noise[1].cpu().view(torch.int32)).abs()
    values = {"largest_ulps": int(ulps.max()), "share_of_values_that_differ": float((ulps > 0).float().mean())}
    context.check("noise within 2 ulps", int(ulps.max()) <= 2, **values)


def _noise_and_words(seeds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Noise float32 (seeds, count) of position 575, and the Philox words int64 (seeds, 4, count / 4) it is made of."""
    block = torch.arange(count // 4, device=seeds.device)[None]
    zero = torch.zeros_like(block)
    key = seeds[:, None] & 0xFFFFFFFF, seeds[:, None] >> 32
    words = torch.stack(torch.broadcast_tensors(*philox((block, zero + 575, zero, zero), key)), dim=1)
    return exponential_noise(seeds, 575, count), words


def compare_int8(context: Context, task: Task, name: str, others: dict[str, Tensor]) -> None:
    """What int8 weights change; engines that have them must agree. `others` are the tokens of those before."""
    if name == "eager":
        return
    if not context.has_time(f"{name}: int8", RESERVE_S):
        return
    tokens = task.sample(build_engine(context, task, name, "int8"), range(len(task.tokens)))
    context.record(f"{name}: int8", **changes(tokens, task.tokens))
    for other, expected in others.items():
        context.check(f"int8: {name} as {other}", torch.equal(tokens, expected), **changes(tokens, expected))
    others[name] = tokens


def compare_bfloat16(context: Context, task: Task, name: str) -> None:
    """What bfloat16 changes against float32, and whether images depend on their batch there.

    They must not on the Triton engine, whose sums have one order for any batch; libraries choose theirs by its size.
    """
    if not context.has_time(f"{name}: bfloat16", RESERVE_S):
        return
    engine = build_engine(context, task, name, dtype=torch.bfloat16)
    whole = task.sample(engine, range(len(task.tokens)))
    context.record(f"{name}: bfloat16", **changes(whole, task.tokens))
    equal = {n: torch.equal(task.sample(engine, range(n)), whole[:n]) for n in (1, min(4, len(whole)))}
    note = context.check if name == "triton" else context.record
    note(f"{name}: bfloat16 in any batch", **{"passed": all(equal.values())} if name == "triton" else {}, equal=equal)
