"""The GPT with the Hugging Face hub's `save_pretrained`, `from_pretrained` and `push_to_hub`.

A saved folder holds `model.safetensors` with the keys of `Transformer` and `config.json` with the `ModelArgs`
fields.
"""

from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file

from autoregressive.models.gpt import ModelArgs, Transformer, size_factories


class TransformerHF(Transformer, PyTorchModelHubMixin, tags=["image-generation", "autoregressive"]):
    """`Transformer` that can be saved to, and loaded from, a folder or a hub repository."""

    # The mixin rebuilds the configuration from the type written here, so it has to be the class and not its
    # name: this file does without postponed annotations.
    def __init__(self, config: ModelArgs) -> None:
        super().__init__(config)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> "TransformerHF":
        """Weights must fit the model, where the mixin by itself would let missing ones pass."""
        return super()._from_pretrained(strict=strict, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        # the mixin's own loader compares keys before the model has dropped those that it tolerates
        model.load_state_dict(load_file(model_file, device=map_location), strict=strict)
        return model.eval()


GPT_models_HF = size_factories(TransformerHF)
GPT_XS, GPT_S = GPT_models_HF["GPT-XS"], GPT_models_HF["GPT-S"]
GPT_B, GPT_L, GPT_XL = GPT_models_HF["GPT-B"], GPT_models_HF["GPT-L"], GPT_models_HF["GPT-XL"]
GPT_XXL, GPT_XXXL = GPT_models_HF["GPT-XXL"], GPT_models_HF["GPT-XXXL"]
GPT_1B, GPT_3B, GPT_7B = GPT_models_HF["GPT-1B"], GPT_models_HF["GPT-3B"], GPT_models_HF["GPT-7B"]
