"""A strided depthwise blur in one pass: the kernels of max-blur pooling with a window of one element.

With kernel_size 1 the maximum, its state and the second read of x are compiled away, and what is left is the blur: the
forward reads x once and writes y once, the backward reads grad_y once and writes grad_x once. (Of what is activated, the blur
is a pooling with windows of one element, whose backward reads x too: 2.25 e bytes.)

Two numbers, 2-d, b=3, s=2, G columns a lane, per input element of e bytes: 1.25 e bytes each way; forward 1 + 1/G loads and 2.25
multiply-adds, backward 0.25 + 1.5/G loads (the border's among them) and 2.25 + 2/G multiply-adds.
"""

from .max_blur_pool import blur_pool_backward
from .max_blur_pool import max_blur_pool as blur_pool

__all__ = ["blur_pool", "blur_pool_backward"]
