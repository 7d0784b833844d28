"""The VQ tokenizer as a Hugging Face Hub model: `from_pretrained`, `save_pretrained` and `push_to_hub`."""

# No postponed annotations here: the mixin reads the class `ModelArgs` off the annotation of `config`.
from dataclasses import asdict, fields
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file

from tokenizer.tokenizer_image.vq_model import ModelArgs, VQModel, model_args

__all__ = ["VQ_8", "VQ_16", "ModelArgs", "VQModel", "VQModelHF", "VQ_models_HF"]

# Written to config.json only where they differ from their defaults: other readers of the published format do
# not know them.
_EXTENSIONS = ("ch", "num_res_blocks", "norm_groups", "quantizer", "fsq_levels")


class VQModelHF(
    VQModel,
    PyTorchModelHubMixin,
    repo_url="https://github.com/FoundationVision/LlamaGen",
    license="mit",
    tags=["llamagen", "text-to-image"],
):
    """`VQModel` whose `ModelArgs` travel as config.json beside model.safetensors."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__(config)
        defaults = {f.name: f.default for f in fields(ModelArgs) if f.name in _EXTENSIONS}
        self._hub_mixin_config = {k: v for k, v in asdict(config).items() if defaults.get(k, ...) != v}

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> "VQModelHF":
        """The model of a Hub repository or local folder, in evaluation mode. Every weight must be there."""
        return super().from_pretrained(*args, strict=strict, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        # the mixin's own loader compares keys before the model has dropped those that it tolerates
        model.load_state_dict(load_file(model_file, device=map_location), strict=strict)
        return model.eval()


def VQ_8(**kwargs: Any) -> VQModelHF:
    """Stride 8. Keywords are fields of `ModelArgs`."""
    return VQModelHF(model_args("VQ-8", **kwargs))


def VQ_16(**kwargs: Any) -> VQModelHF:
    """Stride 16. Keywords are fields of `ModelArgs`."""
    return VQModelHF(model_args("VQ-16", **kwargs))


VQ_models_HF = {"VQ-16": VQ_16, "VQ-8": VQ_8}
