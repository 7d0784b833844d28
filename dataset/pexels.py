"""Pexels photographs: folders of images, read like ImageNet."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from dataset.images import ClassFolders


def build_pexels(args: Namespace, transform: Callable) -> ClassFolders:
    """Images of `args.data_path`, one folder per class."""
    return ClassFolders(args.data_path, transform)
