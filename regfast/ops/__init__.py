"""Each operation: its schemas, its fakes, one autograd Function, and the choice of a path.

The files of an operation have its name: `regfast.ops.rezero`, `regfast.kernels.rezero`,
`regfast.reference.rezero`.
"""

OPERATIONS = ("max_blur_pool", "blur_pool", "mixup", "mixup_cross_entropy", "rezero")
