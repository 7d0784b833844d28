"""vLLM from Python: classes or captions in, codes out.

    from autoregressive.serve.llm import LLM
    with LLM(export_checkpoint(args, vocab_size)) as llm:
        codes = llm.generate([207, 360], seeds=[0, 1], cfg_scale=4.0)

Image i depends on its condition, settings and seed alone, and is the one that `generate` draws with this seed, up to
rounding: see docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.serve.exported import Condition, ExportedModel

OnCodes = Callable[[int], None]


class LLM:
    """One engine with the GPT of an exported folder, in this process or beside it, as vLLM decides.

    Args:
        folder: made by `autoregressive.serve.export`.
        guidance: False draws every image without guidance, at half the work.
        cfg_interval: the last guided decode step, -1 for all.
        max_images: drawn at once; more wait for their turn.
        engine: further keywords of vLLM's ``EngineArgs``.

    Raises:
        ValueError: a folder or settings that vLLM cannot serve.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        guidance: bool = True,
        cfg_interval: float = -1,
        max_images: int = 64,
        **engine: Any,
    ) -> None:
        from vllm import EngineArgs, LLMEngine

        self.model = ExportedModel(folder)
        self.guidance = guidance
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(**self.model.engine_args(guidance, cfg_interval, max_images, **engine))
        )
        self._numbers = count()

    def generate(
        self,
        conditions: Sequence[Condition],
        *,
        seeds: Sequence[int] | int = 0,
        n: int = 1,
        cfg_scale: float | Sequence[float] = 4.0,
        top_k: int = 2000,
        top_p: float = 1.0,
        temperature: float = 1.0,
        on_codes: OnCodes | None = None,
    ) -> Tensor:
        """Draw `n` images of each condition: int32 (len(conditions) * n, block_size), those of one side by side.

        `conditions` are classes, or pairs of caption features (T, caption_dim), left-padded, and their mask (T,).
        `seeds` holds one for each image, or the first of consecutive ones; `cfg_scale` one for all or for each.
        `on_codes` hears how many codes a step has brought. All is checked before anything reaches the engine.

        Raises:
            ValueError: a condition or a setting that does not fit.
        """
        if n < 1:
            raise ValueError(f"at least one image of each condition is drawn, not {n}")
        conditions = [condition for condition in conditions for _ in range(n)]
        total = len(conditions)
        seeds = range(seeds, seeds + total) if isinstance(seeds, int) else seeds
        scales = [cfg_scale] * total if isinstance(cfg_scale, int | float) else cfg_scale
        if len(seeds) != total or len(scales) != total:
            raise ValueError(f"{total} images need as many seeds and scales; got {len(seeds)} and {len(scales)}")
        if not self.guidance and any(scale > 1 for scale in scales):
            raise ValueError("this engine was started with guidance=False: cfg_scale is at most 1")
        requests = [
            (self.model.prompt(condition), self._params(seed, scale, top_k, top_p, temperature, on_codes is not None))
            for condition, seed, scale in zip(conditions, seeds, scales, strict=True)
        ]
        codes = self._run(requests, on_codes)
        return torch.tensor(codes, dtype=torch.int32).view(total, self.model.args.block_size)

    def _params(self, seed: int, scale: float, top_k: int, top_p: float, temperature: float, streaming: bool) -> Any:
        return self.model.sampling_params(
            seed=seed, cfg_scale=scale, top_k=top_k, top_p=top_p, temperature=temperature, streaming=streaming
        )

    def _run(self, requests: Sequence[tuple[dict[str, Any], Any]], on_codes: OnCodes | None) -> list[list[int]]:
        """The codes of all requests, in their order."""
        names = [self.submit(prompt, params) for prompt, params in requests]
        done: dict[str, list[int]] = {}
        seen = dict.fromkeys(names, 0)
        try:
            while len(done) < len(names):
                before = sum(seen.values())
                for name, codes, finished in self.step():
                    seen[name] = len(codes)
                    if finished:
                        done[name] = self.model.check_codes(codes)
                if on_codes is not None:
                    on_codes(sum(seen.values()) - before)
        except BaseException:  # Ctrl-C too: the next call finds an empty engine
            self.engine.abort_request([name for name in names if name not in done])
            raise
        return [done[name] for name in names]

    def submit(self, prompt: dict[str, Any], params: Any) -> str:
        """Hand one request to the engine; `step` then works on it. Returns its name."""
        name = f"image-{next(self._numbers)}"
        self.engine.add_request(name, self.engine.renderer.render_cmpl([prompt])[0], params)
        return name

    def step(self) -> Iterator[tuple[str, list[int], bool]]:
        """One step of the engine: the requests that moved, with their codes so far and whether they are finished."""
        for output in self.engine.step():
            yield output.request_id, list(output.outputs[0].token_ids), output.finished

    def close(self) -> None:
        """End the engine and give its memory back. It is of no use afterwards."""
        self.engine.engine_core.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
