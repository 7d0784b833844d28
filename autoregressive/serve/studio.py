"""The loaded models: pictures of a batch of jobs, with progress and previews on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.engine import Engine
from autoregressive.sample.editing import edit_codes, last_drawn
from autoregressive.sample.masks import as_pixels
from autoregressive.sample.pipeline import load_models, make_decoder, sample_codes, sampling_options
from autoregressive.sample.text import TextConditions
from autoregressive.serve.cards import Card
from autoregressive.serve.requests import Edit, Sampling
from tokenizer.coding import ImageDecoder, encode_images
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.image import to_float, to_uint8

_WARM_BATCH = 8  # images; a GPU is prepared for this batch before the first request, and decodes as many at a time
_SECONDS_BETWEEN_REPORTS = 0.05
_PREVIEW_SHARE = 0.2  # of the time may go into previews
_EMPTY = 0.85  # grey of cells that are not drawn yet, in [-1, 1]


@dataclass(frozen=True)
class Job:
    """One picture. Jobs with the same `key` can be drawn in one batch, and come out as if each were drawn alone."""

    model: str
    subject: int | str
    sampling: Sampling
    seed: int
    edit: Edit | None = field(default=None, compare=False)
    previews: bool = False

    @property
    def key(self) -> tuple[str, Sampling, bool]:
        """What the jobs of a batch have in common."""
        return self.model, self.sampling, self.edit is not None


# Called with (codes done, codes in all, previews uint8 (B, edge, edge, 3) or None). It may raise, to stop the drawing.
Watch = Callable[[int, int, "np.ndarray | None"], None]


@dataclass
class _Loaded:
    card: Card
    gpt: Engine
    tokenizer: VQModel
    decode: ImageDecoder
    text: TextConditions | None


class Studio:
    """Models of some cards on one device. Not for several threads at once.

    Raises:
        ValueError: a checkpoint that is missing or does not fit.
    """

    def __init__(self, cards: Sequence[Card], device: torch.device) -> None:
        self.device = device
        self._loaded = {card.name: self._load(card) for card in cards}

    def _load(self, card: Card) -> _Loaded:
        text = TextConditions(card.args, self.device) if card.kind == "t2i" else None
        gpt, tokenizer = load_models(card.args, self.device, card.kind)
        gpt.warm_up(_WARM_BATCH, **sampling_options(card.args))
        decoder = make_decoder(card.args, tokenizer, _WARM_BATCH)
        decoder.warm_up(card.grid**2)
        return _Loaded(card, gpt, tokenizer, decoder, text)

    def engine_name(self, model: str) -> str:
        """How its GPT is computed."""
        return self._loaded[model].gpt.name

    def draw(self, jobs: Sequence[Job], watch: Watch | None = None) -> np.ndarray:
        """The pictures of jobs with one key: uint8 (B, edge, edge, 3)."""
        loaded = self._loaded[jobs[0].model]
        out = torch.zeros(len(jobs), loaded.card.grid**2, dtype=torch.int32, device=self.device)
        reporter = _Reporter(loaded.decode, jobs, out, watch) if watch else None
        options = {**sampling_options(loaded.card.args), **vars(jobs[0].sampling), "on_token": reporter, "out": out}
        condition = self._condition(loaded, jobs)
        seeds = [job.seed for job in jobs]
        if jobs[0].edit is None:
            codes = sample_codes(loaded.gpt, args=loaded.card.args, seeds=seeds, **condition, **options)
        else:
            codes = self._edit(loaded, jobs, seeds, condition, options)
        return to_uint8(loaded.decode(codes)).cpu().numpy()

    def _condition(self, loaded: _Loaded, jobs: Sequence[Job]) -> dict[str, Any]:
        """Keywords of `generate` for what the jobs are of."""
        subjects = [job.subject for job in jobs]
        if loaded.text is not None:
            return loaded.text([str(subject) for subject in subjects])
        return {"cond": torch.tensor(subjects, device=self.device)}

    def _edit(
        self, loaded: _Loaded, jobs: Sequence[Job], seeds: list[int], condition: dict[str, Any], options: dict[str, Any]
    ) -> Tensor:
        edits = [job.edit for job in jobs if job.edit is not None]
        pictures = torch.from_numpy(np.stack([edit.picture for edit in edits]))
        mask = torch.from_numpy(np.stack([edit.mask for edit in edits]))
        codes = encode_images(loaded.tokenizer, to_float(pictures).to(self.device))
        cond = condition.pop("cond")
        return edit_codes(loaded.gpt, codes, mask, cond, seeds, **condition, **options)


class _Reporter:
    """Tells a watcher how far a batch is, not too often, and shows it as pictures as far as that costs little."""

    def __init__(self, decode: ImageDecoder, jobs: Sequence[Job], out: Tensor, watch: Watch) -> None:
        self.decode, self.out, self.watch = decode, out, watch
        masks = [job.edit.mask for job in jobs if job.edit is not None]
        self.edits = bool(masks)
        self.total = last_drawn(torch.from_numpy(np.stack(masks))) + 1 if masks else out.shape[1]
        self.previews = any(job.previews for job in jobs)
        self.next_report = self.next_preview = 0.0

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        if now < self.next_report:
            return
        pictures = None
        if self.previews and now >= self.next_preview:
            pictures = partial_pictures(self.decode, self.out, self.out.shape[1] if self.edits else step + 1)
            self.next_preview = now + (time.monotonic() - now) / _PREVIEW_SHARE
        self.next_report = time.monotonic() + _SECONDS_BETWEEN_REPORTS
        self.watch(step + 1, self.total, pictures)


def partial_pictures(decode: ImageDecoder, codes: Tensor, done: int) -> np.ndarray:
    """Pictures of the first `done` of codes (B, N), the rest grey: uint8 (B, H, W, 3).

    Cells that are not there get the last code drawn, so that the decoder, which looks around, sees nothing odd.
    """
    grid = int(codes.shape[1] ** 0.5)
    shown = codes.clone()
    shown[:, done:] = codes[:, done - 1 : done]
    images = decode(shown)
    there = torch.arange(codes.shape[1], device=codes.device) < done
    inside = as_pixels(there, images.shape[-1] // grid)
    return to_uint8(torch.where(inside, images, _EMPTY)).cpu().numpy()
