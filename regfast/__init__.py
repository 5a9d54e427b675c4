"""regfast: anti-aliased pooling and other regularisers of vision models, each in one pass."""

from . import filters, functional
from .dispatch import backend, debug
from .pooling import BlurLayer, BlurPool1d, BlurPool2d, BlurPool3d, MaxPool1dAA, MaxPool2dAA, MaxPool3dAA
from .warmup import warm_up

__version__ = "0.1.0"

__all__ = [
    "BlurLayer",
    "BlurPool1d",
    "BlurPool2d",
    "BlurPool3d",
    "MaxPool1dAA",
    "MaxPool2dAA",
    "MaxPool3dAA",
    "backend",
    "debug",
    "filters",
    "functional",
    "warm_up",
]
