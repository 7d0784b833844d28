"""The configuration of an exported GPT, as transformers and vLLM read it from ``config.json``."""

from __future__ import annotations

from transformers import PretrainedConfig

from autoregressive.models.config import ModelArgs
from autoregressive.serve.vllm_plugin import MODEL_TYPE


class LlamaGenConfig(PretrainedConfig):
    """All fields come from the file; `autoregressive.serve.export` writes it and says what they mean."""

    model_type = MODEL_TYPE

    @property
    def gpt_args(self) -> ModelArgs:
        """The GPT's own configuration."""
        return ModelArgs(**self.gpt)
