"""What teaches an unchanged vLLM this project's GPT: `register` is the entry point ``vllm.general_plugins``.

Guidance happens inside one request. Every token carries two hidden rows, a conditional and an unconditional one, and
in attention the two are the two halves of the heads of one layer. So vLLM schedules an ordinary decoder with twice
the heads: one request for each image, whatever arrives, waits or is preempted beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

ARCHITECTURE = "LlamaGenForImageGeneration"
MODEL_TYPE = "llamagen"
LOGITS_PROCESSOR = f"{__name__}.guidance:GuidedDrawing"


def register() -> None:
    """Make the model type and the architecture known. vLLM calls this in each of its processes, maybe repeatedly."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from autoregressive.serve.vllm_plugin.config import LlamaGenConfig

    AutoConfig.register(MODEL_TYPE, LlamaGenConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    if multiprocessing.current_process().name.startswith("EngineCore"):
        _end_with_parent()


def _end_with_parent() -> None:
    """End this engine's process when the one that started it is gone, killed say: vLLM's would stay for ever."""
    if any(thread.name == _end_with_parent.__name__ for thread in threading.enumerate()):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name=_end_with_parent.__name__, daemon=True).start()
