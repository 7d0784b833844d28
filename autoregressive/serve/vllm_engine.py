"""vLLM for a server: images arrive at any time, are drawn together, and are followed code by code.

engine = VLLMEngine(folder)                          # takes seconds; the work is done in a process of vLLM's
async for codes in engine.draw_codes(207, seed=0):   # the codes so far; the last ones are the whole image
    ...
await engine.shutdown()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from autoregressive.serve.exported import Condition, ExportedModel


class EngineDied(RuntimeError):
    """vLLM's process has ended; every image at work is lost, and the engine must be made anew."""


def vllm_installed() -> bool:
    """Whether this Python environment has vLLM (scripts/setup_vllm.sh makes one that does)."""
    return find_spec("vllm") is not None


class VLLMEngine:
    """One engine for the GPT of an exported folder.

    Args:
        folder: made by `autoregressive.serve.export`.
        cfg_interval: the last guided decode step of every image, -1 for all.
        max_images: drawn at once; more wait for their turn.
        engine: further keywords of vLLM's ``AsyncEngineArgs``.

    Raises:
        ValueError: a folder or settings that vLLM cannot serve.
        RuntimeError: vLLM's process did not start; its output says why.
    """

    def __init__(self, folder: str | Path, *, cfg_interval: float = -1, max_images: int = 64, **engine: Any) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.model = ExportedModel(folder)
        args = self.model.engine_args(self.model.can_guide, cfg_interval, max_images, **engine)
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args, enable_log_requests=False))
        self._numbers = count()

    @property
    def alive(self) -> bool:
        """Whether images can be drawn."""
        return self._engine is not None and not self._engine.errored

    @property
    def unfinished(self) -> int:
        """Images at work or waiting."""
        return 0 if self._engine is None else self._engine.get_num_unfinished_requests()

    def draw_codes(
        self,
        condition: Condition,
        *,
        seed: int | None = 0,
        cfg_scale: float = 4.0,
        top_k: int = 2000,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ) -> AsyncGenerator[list[int], None]:
        """Draw one image: yields its codes so far, each time some more, at last all `block_size` of them.

        Who stops listening (``aclose``, a cancelled task) stops the drawing. The arguments are those of
        `ExportedModel.sampling_params`.

        Raises:
            ValueError: here, before anything is drawn, for a condition or a setting that does not fit.
            EngineDied: while listening, when vLLM's process has ended.
        """
        if not self.model.can_guide and cfg_scale > 1:
            raise ValueError(
                "this model has no null class (it was trained without class dropout): cfg_scale is at most 1"
            )
        params = self.model.sampling_params(
            seed=seed, cfg_scale=cfg_scale, top_k=top_k, top_p=top_p, temperature=temperature, streaming=True
        )
        return self._stream(self.model.prompt(condition), params)

    async def _stream(self, prompt: dict[str, Any], params: Any) -> AsyncGenerator[list[int], None]:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if not self.alive:
            raise EngineDied("vLLM's process has ended; make a new engine")
        (rendered,) = self._engine.renderer.render_cmpl([prompt])
        outputs = self._engine.generate(rendered, params, f"image-{next(self._numbers)}")
        try:
            async for output in outputs:
                codes = list(output.outputs[0].token_ids)
                if output.outputs[0].finish_reason == "abort":
                    raise EngineDied("vLLM was shut down while it drew this image")
                yield self.model.check_codes(codes) if output.finished else codes
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDied("vLLM's process ended while it drew this image; its output says why") from error
        finally:
            await outputs.aclose()  # vLLM drops the image if it is not finished

    async def shutdown(self, timeout: float = 10.0) -> None:
        """End vLLM's process, after at most `timeout` seconds by force. Images at work are lost.

        To be called in the event loop that drew the images: vLLM's sockets are closed there, and a process in which
        they stay open cannot end.
        """
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, timeout)
            await asyncio.sleep(0)  # the loop's turn to close them
