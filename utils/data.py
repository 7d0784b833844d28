"""The image crop under its established import path."""

from dataset.augmentation import center_crop_arr

__all__ = ["center_crop_arr"]
