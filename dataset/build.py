"""One name for each data set."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch.utils.data import Dataset

from dataset.coco import build_coco
from dataset.imagenet import build_imagenet, build_imagenet_code
from dataset.openimage import build_openimage
from dataset.pexels import build_pexels
from dataset.t2i import build_t2i, build_t2i_code, build_t2i_image
from dataset.tars import build_tars

BUILDERS = {
    "imagenet": build_imagenet,
    "imagenet_code": build_imagenet_code,
    "coco": build_coco,
    "openimage": build_openimage,
    "pexels": build_pexels,
    "tars": build_tars,
    "t2i_image": build_t2i_image,
    "t2i": build_t2i,
    "t2i_code": build_t2i_code,
}


def build_dataset(args: Namespace, **kwargs: Any) -> Dataset:
    """The data set called `args.dataset`; image sets need ``transform=``, code sets take nothing else.

    Raises:
        ValueError: when there is no data set of that name.
    """
    if args.dataset not in BUILDERS:
        raise ValueError(f"there is no dataset {args.dataset!r}; choose one of {', '.join(BUILDERS)}")
    return BUILDERS[args.dataset](args, **kwargs)
