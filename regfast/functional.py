"""The operations as functions."""

from .ops.blur_pool import blur_pool1d, blur_pool2d, blur_pool3d
from .ops.max_blur_pool import max_blur_pool1d, max_blur_pool2d, max_blur_pool3d
from .ops.mixup import mixup
from .ops.mixup_cross_entropy import mixup_cross_entropy
from .ops.rezero import rezero

__all__ = [
    "blur_pool1d",
    "blur_pool2d",
    "blur_pool3d",
    "max_blur_pool1d",
    "max_blur_pool2d",
    "max_blur_pool3d",
    "mixup",
    "mixup_cross_entropy",
    "rezero",
]
