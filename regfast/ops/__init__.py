"""The operations' seam: of each, the schemas, the fakes, one autograd Function, and the function that chooses a path.

Every room has a file by an operation's name: `regfast.ops.rezero`, `regfast.kernels.rezero`, `regfast.reference.rezero`.
"""

OPERATIONS = ("max_blur_pool", "blur_pool", "mixup", "mixup_cross_entropy", "rezero")
