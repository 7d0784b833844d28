"""From two rows of logits to the next code of each request: guidance and drawing, with settings of its own for each.

A request brings them in ``SamplingParams(extra_args=...)``:

* ``cfg_scale``: guidance scale; default: that of the exported folder.
* ``image_seed``: the code is drawn here, with the noise of `autoregressive.models.noise`, so that a seed gives the
  picture that every other engine of this project gives. ``image_temperature``, ``image_top_k``, ``image_top_p`` go
  with it, and vLLM itself is told to be greedy (temperature 0). Without ``image_seed`` vLLM draws.

One class serves both of vLLM's model runners, whose interfaces differ: see `GuidedDrawing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from autoregressive.models.noise import exponential_noise
from autoregressive.models.sampling import logits_to_probs

EXTRA_ARGS = ("cfg_scale", "image_seed", "image_temperature", "image_top_k", "image_top_p")


class NullLogits:
    """The unconditional logits (B, V) of the step at hand, handed from the model to the processor."""

    rows: Tensor | None = None


_null_logits: dict[str, NullLogits] = {}  # by the engine; several may live in a process, one after another


def null_logits_of(vllm_config: VllmConfig) -> NullLogits:
    """What the model and the processor of one engine share."""
    return _null_logits.setdefault(vllm_config.instance_id, NullLogits())


@dataclass(frozen=True)
class Settings:
    """How the codes of one request are drawn; `seed` None leaves the drawing to vLLM."""

    cfg_scale: float
    seed: int | None
    temperature: float
    top_k: int
    top_p: float

    @property
    def group(self) -> tuple[float, int, float] | None:
        """Requests that may be filtered together have equal ones; None: nothing is drawn here."""
        return None if self.seed is None else (self.temperature, self.top_k, self.top_p)


def settings_of(params: SamplingParams, default_scale: float) -> Settings:
    """The settings that a request brings.

    Raises:
        ValueError: an extra argument of the wrong type, or out of range.
    """
    extra: Mapping[str, Any] = params.extra_args or {}
    values = {name: extra.get(name) for name in EXTRA_ARGS}
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is a number, not {value!r}")
    seed, scale = values["image_seed"], values["cfg_scale"]
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"image_seed is a whole number, 0 to 2^63 - 1, not {seed!r}")
    return Settings(
        cfg_scale=max(float(default_scale if scale is None else scale), 1.0),
        seed=seed,
        temperature=float(1.0 if values["image_temperature"] is None else values["image_temperature"]),
        top_k=int(values["image_top_k"] or 0),
        top_p=float(1.0 if values["image_top_p"] is None else values["image_top_p"]),
    )


def guide(cond: Tensor, null: Tensor, scales: Tensor) -> Tensor:
    """Guided logits (B, V) of rows with scales (B,): exactly `cond` where a scale is 1."""
    scales = scales[:, None]
    return torch.where(scales == 1, cond, null + scales * (cond - null))


def draw_into(logits: Tensor, settings: Sequence[Settings], steps: Tensor) -> Tensor:
    """Logits (B, V) whose best entry is the drawn code, in rows that are drawn here; the others as they are.

    `steps` (B,) counts the codes that each image has. Temperature 0 is the likeliest code.
    """
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, chosen in enumerate(settings):
        if chosen.group is not None and chosen.temperature > 0:
            groups.setdefault(chosen.group, []).append(row)
    for (temperature, top_k, top_p), members in groups.items():
        rows = torch.tensor(members, device=logits.device)
        seeds = torch.tensor([settings[row].seed for row in members], device=logits.device)
        probs = logits_to_probs(logits[rows], temperature, top_p, top_k)
        noise = exponential_noise(seeds, steps[rows, None], logits.shape[1])
        logits[rows] = probs / noise
    return logits


class GuidedDrawing(ProcessorV1, ProcessorV2):
    """The processor of one engine.

    Model runner V1 (CPU) tells of requests by their rows (`update_state`), V2 (GPU) by slots (`add_request`) to which
    the rows of a step are mapped. Neither refuses a class that implements the other's interface as well.
    """

    def __init__(self, vllm_config: VllmConfig, second: Any, is_pin_memory: bool | None = None) -> None:
        self._null = null_logits_of(vllm_config)
        self._default_scale = float(vllm_config.model_config.hf_config.cfg_scale)
        self._requests: dict[int, tuple[Settings, list[int]]] = {}  # V1: by row, with the codes drawn so far
        self._slots: dict[int, Settings] = {}  # V2
        self._states = None if isinstance(second, torch.device) else second  # V2: the runner's request states

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what would go wrong later; vLLM calls this where requests come in."""
        settings_of(sampling_params, 1.0)
        if sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs have no meaning for an image; leave them out")

    def is_argmax_invariant(self) -> bool:
        """It decides what the best code is."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: requests have come, gone or changed their rows."""
        process_dict_updates(
            self._requests, batch_update, lambda params, _, codes: (settings_of(params, self._default_scale), codes)
        )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot."""
        self._slots[req_idx] = settings_of(sampling_params, self._default_scale)
        return True

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Guide, and draw: conditional logits float32 (B, V) to those that vLLM goes on with."""
        if ctx is None:
            present = [self._requests[row] for row in range(len(logits))]
            settings = [chosen for chosen, _ in present]
            steps = torch.tensor([len(codes) for _, codes in present], device=logits.device)
        else:
            settings = [self._slots[slot] for slot in ctx.idx_mapping_np.tolist()]
            steps = ctx.pos + 1 - self._states.prompt_len.gpu[ctx.expanded_idx_mapping]
        null, self._null.rows = self._null.rows, None
        if null is not None:
            if null.shape != logits.shape:
                raise RuntimeError(f"{len(null)} unconditional rows of logits for {len(logits)} requests")
            scales = torch.tensor([chosen.cfg_scale for chosen in settings], device=logits.device)
            logits = guide(logits, null, scales)
        return draw_into(logits, settings, steps)
