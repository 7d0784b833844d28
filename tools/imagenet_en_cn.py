"""ImageNet's 1000 classes in English and Chinese: `IMAGENET_1K_CLASSES`, from the id to "synonyms [Chinese name]".

The dictionary is made when it is first asked for, as the English names take seconds to import.
"""

from __future__ import annotations

from dataset.imagenet_names import imagenet_chinese, imagenet_synonyms

IMAGENET_1K_CLASSES: dict[int, str]  # made by __getattr__


def __getattr__(name: str) -> dict[int, str]:
    if name != "IMAGENET_1K_CLASSES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    names = zip(imagenet_synonyms(), imagenet_chinese(), strict=True)
    classes = {i: f"{', '.join(english)} [{chinese}]" for i, (english, chinese) in enumerate(names)}
    return globals().setdefault(name, classes)
