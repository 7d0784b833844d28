"""What a GPT in training draws: the same conditions and the same seeds each time, so that one sees what it learns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from autoregressive.models.gpt import Transformer
from autoregressive.train.inputs import Inputs
from autoregressive.train.live_sampling import LiveSampler
from tokenizer.coding import decode_codes
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.distributed import is_main
from utils.seeding import mix_seed


def some_items(samples: Dataset, count: int) -> list[Tensor]:
    """A batch of `count` samples, spread evenly over the data set (fewer when it has fewer)."""
    places = torch.linspace(0, len(samples) - 1, min(count, len(samples))).round().long().tolist()  # type: ignore[arg-type]
    return default_collate([samples[place] for place in places])


def decoded_batch(inputs: Inputs, samples: Dataset, tokenizer: VQModel, count: int = 16) -> Tensor:
    """Codes of the training data as pictures (n, 3, H, W): what the GPT is to learn to draw."""
    return decode_codes(tokenizer, inputs(some_items(samples, count))["targets"])


class SamplePictures:
    """Draws with the weights in training, and with the averaged ones.

    Args:
        conditions: labels int64 (n,), or caption features (n, T, width) together with their `text` (n, T), which is
            true on text and false on padding.
        everywhere: all processes compute, as sharded weights need it; else rank 0 alone.
    """

    def __init__(
        self,
        models: Mapping[str, Transformer],
        tokenizer: VQModel,
        conditions: Tensor,
        text: Tensor | None,
        *,
        precision: str,
        seed: int,
        cfg_scale: float,
        everywhere: bool,
    ) -> None:
        self.models, self.tokenizer, self.conditions, self.text = models, tokenizer, conditions, text
        self.seed, self.everywhere = seed, everywhere
        self._sampler = LiveSampler(precision, cfg_scale, sharded=everywhere)

    def __call__(self) -> dict[str, Tensor]:
        """Name of each set of weights -> pictures (n, 3, H, W) in [-1, 1]."""
        if not (is_main() or self.everywhere):
            return {}
        return {name: self._all(model) for name, model in self.models.items()}

    def _all(self, model: Transformer) -> Tensor:
        with self.sampling(model) as sample:
            return sample(list(range(len(self.conditions))))

    @contextlib.contextmanager
    def sampling(self, model: Transformer) -> Iterator[Callable[[list[int]], Tensor]]:
        """Inside, a function from numbers of conditions to their images (n, 3, H, W), each from a seed of its own.

        The weights of `model` must not change inside.
        """
        with self._sampler.sampling(model) as sample_codes:

            @torch.no_grad()
            def sample(numbers: list[int]) -> Tensor:
                seeds = [mix_seed(self.seed, number) for number in numbers]
                text = None if self.text is None else self.text[numbers]
                return decode_codes(self.tokenizer, sample_codes(self.conditions[numbers], seeds, text))

            yield sample


def spread_labels(classes: int, count: int, device: torch.device) -> Tensor:
    """`count` labels, spread evenly over all classes."""
    return torch.linspace(0, classes - 1, count, device=device).round().long()


def some_captions(inputs: Inputs, samples: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """Features (n, T, width) and text mask (n, T) of captions of a data set with features, on the device."""
    batch: Sequence[Tensor] = some_items(samples, count)
    return inputs(batch)["cond_idx"], batch[2].to(inputs.device)
