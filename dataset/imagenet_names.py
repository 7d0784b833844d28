"""The names of ImageNet's 1000 classes, in English from the packages that already carry them.

torchvision gives one short name to each class, timm all of WordNet's synonyms: class 387 is "lesser panda" to the one
and "lesser panda, red panda, panda, bear cat, cat bear, Ailurus fulgens" to the other. Nothing is downloaded. The
Chinese names are our own, in `imagenet_chinese.txt`: a line for each class, its id and its name.
"""

from __future__ import annotations

import functools
from pathlib import Path

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


@functools.cache
def imagenet_chinese() -> list[str]:
    """The names in simplified Chinese, in the order of the class ids; no two are equal."""
    lines = Path(__file__).with_name("imagenet_chinese.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]
