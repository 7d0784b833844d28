"""What a client of vLLM knows of an exported GPT: its prompts, its sampling parameters, how an engine is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from autoregressive.models.condition import caption_projection
from autoregressive.models.config import ModelArgs
from autoregressive.models.sampling import check_sampling
from autoregressive.serve.export import stream_fields
from autoregressive.serve.vllm_plugin import LOGITS_PROCESSOR, MODEL_TYPE
from utils.files import read_json
from utils.seeding import mix_seed

Condition = int | tuple[Tensor, Tensor]  # a class, or features (T, caption_dim) of a caption and its mask (T,)
_KV_BLOCK = 128  # tokens; vLLM's own choice on a CPU
_MOST_IMAGES = 64


class ExportedModel:
    """A folder of `autoregressive.serve.export`.

    Raises:
        FileNotFoundError, ValueError: it is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.fields = read_json(self.folder / "config.json")
        if self.fields.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"{folder} holds a {self.fields.get('model_type')} model, not an exported GPT of this project"
            )
        self.args = ModelArgs(**self.fields["gpt"])
        self.dtype = getattr(torch, self.fields["dtype"])
        self._project: Any = None

    @property
    def can_guide(self) -> bool:
        """Whether the model has a null condition."""
        return self.args.model_type == "t2i" or self.args.class_dropout_prob > 0

    def engine_args(
        self, guidance: bool = True, cfg_interval: float = -1, max_images: int = _MOST_IMAGES, **further: Any
    ) -> dict[str, Any]:
        """Keywords of vLLM's ``EngineArgs``; `further` are its own and win.

        `max_images` are drawn at once, others wait. The memory of the keys and values is sized for them, unless
        `further` says otherwise; nothing is preempted then.

        Raises:
            ValueError: guidance of a model that has no null class.
        """
        if guidance and not self.can_guide:
            raise ValueError(
                "this model has no null class (it was trained without class dropout): draw without guidance"
            )
        if max_images < 1:
            raise ValueError(f"at least one image is drawn at a time, not {max_images}")
        positions = self.args.cls_token_num + self.args.block_size
        args: dict[str, Any] = {
            "model": str(self.folder),
            "dtype": self.fields["dtype"],
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logits_processors": [LOGITS_PROCESSOR],
            "hf_overrides": {**stream_fields(self.args, 2 if guidance else 1), "cfg_interval": cfg_interval},
            "enable_prompt_embeds": self.args.model_type == "t2i",
            "enable_prefix_caching": False,  # a class is a prompt of one token
            "enforce_eager": not torch.cuda.is_available(),  # on a CPU, compiling takes minutes and brings little
            "max_model_len": positions,
            "max_num_seqs": max_images,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & further.keys():
            blocks = 1 + max_images * math.ceil(positions / _KV_BLOCK)
            args["kv_cache_memory_bytes"] = blocks * _KV_BLOCK * self.bytes_per_token(2 if guidance else 1)
        return {**args, **further}

    def bytes_per_token(self, streams: int) -> int:
        """Bytes of the keys and values of one position."""
        heads = self.args.kv_heads * streams * self.fields["head_dim"]
        return 2 * self.args.n_layer * heads * self.dtype.itemsize

    def prompt(self, condition: Condition) -> dict[str, Any]:
        """The prompt of one image.

        Raises:
            ValueError: a class that the model has not, or a caption that does not fit it.
        """
        if self.args.model_type == "c2i":
            return {"prompt_token_ids": [self.args.vocab_size + self._label(condition)]}
        features = self._text(condition)
        if self._project is None:
            with safetensors.safe_open(self.folder / "model.safetensors", framework="pt") as file:
                names = [name for name in file.keys() if "cap_proj" in name]  # noqa: SIM118 - it is no dict
                self._project = caption_projection({name: file.get_tensor(name) for name in names})
        # blocks of keys may be shared among prompts that begin alike, but only if they stand at the same positions
        return {"prompt_embeds": self._project(features), "cache_salt": f"length {len(features)}"}

    def _label(self, condition: Condition) -> int:
        if isinstance(condition, Tensor) and condition.ndim == 0 and not condition.is_floating_point():
            condition = int(condition)
        if isinstance(condition, bool) or not isinstance(condition, int):
            raise ValueError(f"this model draws classes: expected a number, got {type(condition).__name__}")
        if not 0 <= condition < self.args.num_classes:
            raise ValueError(f"classes are 0 to {self.args.num_classes - 1}, not {condition}")
        return condition

    def _text(self, condition: Condition) -> Tensor:
        """The features of the text alone (n, caption_dim), in the model's format."""
        count, width = self.args.cls_token_num, self.args.caption_dim
        if not isinstance(condition, tuple) or len(condition) != 2:
            raise ValueError("this model draws texts: expected the features of a caption and their mask")
        features, mask = condition
        if features.ndim != 2 or features.shape[1] != width or mask.shape != features.shape[:1] or len(mask) < count:
            raise ValueError(
                f"expected features ({count}, {width}) with a mask ({count},); got {tuple(features.shape)} and "
                f"{tuple(mask.shape)}"
            )
        features, text = features[:count], mask[:count].bool()
        length = int(text.sum())
        if length == 0 or not bool(text[count - length :].all()):
            raise ValueError("the text must stand at the right end of its positions (left-padded), and not be empty")
        if not bool(features.isfinite().all()):
            raise ValueError("the features of the caption are not finite")
        return features[count - length :].to("cpu", self.dtype)

    def sampling_params(
        self,
        *,
        seed: int | None = 0,
        cfg_scale: float = 4.0,
        top_k: int = 2000,
        top_p: float = 1.0,
        temperature: float = 1.0,
        streaming: bool = False,
    ) -> Any:
        """vLLM's ``SamplingParams`` of one image.

        `seed` gives the image that the other engines of this project give for it; None gives any image. Scales up to
        1 are no guidance, `top_k` 0 and `top_p` 1 leave out nothing, `temperature` 0 takes the likeliest code.

        Raises:
            ValueError: a value that means nothing.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_sampling(cfg_scale, top_k, top_p, temperature)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        return SamplingParams(
            temperature=0.0,  # the codes are drawn by the plugin
            max_tokens=self.args.block_size,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if streaming else RequestOutputKind.FINAL_ONLY,
            extra_args={
                "cfg_scale": float(cfg_scale),
                "image_seed": mix_seed(seed),
                "image_temperature": float(temperature),
                "image_top_k": int(top_k),
                "image_top_p": float(top_p),
            },
        )

    def check_codes(self, codes: Sequence[int]) -> list[int]:
        """The codes of a finished image, as they are.

        Raises:
            RuntimeError: they are not those of a whole image.
        """
        if len(codes) != self.args.block_size or not 0 <= min(codes) <= max(codes) < self.args.vocab_size:
            raise RuntimeError(f"vLLM ended an image of {self.args.block_size} codes after {len(codes)}")
        return list(codes)
