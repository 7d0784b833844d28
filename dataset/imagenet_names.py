"""The names of ImageNet's 1000 classes, from the packages that already carry them.

torchvision gives one short name to each class, timm all of WordNet's synonyms: class 387 is "lesser panda" to the one
and "lesser panda, red panda, panda, bear cat, cat bear, Ailurus fulgens" to the other. Nothing is downloaded.
"""

from __future__ import annotations

import functools

NUM_CLASSES = 1000


@functools.cache
def imagenet_names() -> list[str]:
    """The short names, in the order of the class ids; no two are equal."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.DEFAULT.meta["categories"])


@functools.cache
def imagenet_synonyms() -> list[list[str]]:
    """All names of each class, in the order of the class ids. Some are shared: 134 and 517 are both "crane"."""
    from timm.data import ImageNetInfo  # here, as it takes seconds to import

    info = ImageNetInfo()
    return [info.index_to_description(i, detailed=False).split(", ") for i in range(NUM_CLASSES)]
