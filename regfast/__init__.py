"""regfast: anti-aliased pooling, MixUp and other regularisers for vision, each in one pass."""

from . import filters, functional, metrics
from ._core.dispatch import backend, debug
from .convert import antialias, antialias_report, restore
from .convolution import Conv1dAA, Conv2dAA, ConvNormActAA
from .fusion import fuse
from .losses import (
    MixupBCEWithLogitsLoss,
    MixupCrossEntropyLoss,
    MixupLoss,
    mixup_accuracy,
    mixup_criterion,
)
from .manifold import ManifoldMixup
from .mixing import MixedTarget, MixUp, MixupCollator, mixup_data
from .pooling import (
    AvgPool1dAA,
    AvgPool2dAA,
    AvgPool3dAA,
    BlurLayer,
    BlurPool1d,
    BlurPool2d,
    BlurPool3d,
    MaxPool1dAA,
    MaxPool2dAA,
    MaxPool3dAA,
)
from .residual import (
    BottleneckBlock,
    ResidualBlock,
    ResidualLinear,
    ReZero,
    ReZeroTransformerEncoderLayer,
    parameter_groups,
)
from .warmup import warm_up

__version__ = "0.1.0"

__all__ = [
    "AvgPool1dAA",
    "AvgPool2dAA",
    "AvgPool3dAA",
    "BlurLayer",
    "BlurPool1d",
    "BlurPool2d",
    "BlurPool3d",
    "BottleneckBlock",
    "Conv1dAA",
    "Conv2dAA",
    "ConvNormActAA",
    "ManifoldMixup",
    "MaxPool1dAA",
    "MaxPool2dAA",
    "MaxPool3dAA",
    "MixUp",
    "MixedTarget",
    "MixupBCEWithLogitsLoss",
    "MixupCollator",
    "MixupCrossEntropyLoss",
    "MixupLoss",
    "ReZero",
    "ReZeroTransformerEncoderLayer",
    "ResidualBlock",
    "ResidualLinear",
    "antialias",
    "antialias_report",
    "backend",
    "debug",
    "filters",
    "functional",
    "fuse",
    "metrics",
    "mixup_accuracy",
    "mixup_criterion",
    "mixup_data",
    "parameter_groups",
    "restore",
    "warm_up",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
