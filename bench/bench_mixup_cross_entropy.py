"""The loss of mixed labels against two cross entropies and against soft targets."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from peers import load
from timing import CUDA, DIRECTIONS, DTYPES, FORMATS, compiled, images

from regfast.functional import mixup_cross_entropy

ROWS = [(65536, 1000), (4096, 32000)] if CUDA else [(1024, 1000)]
MAPS = [(32, 21, 512, 512)] if CUDA else []
LOGITS = [*product(ROWS, ["NC"]), *product(MAPS, FORMATS)]


def two_terms(z, a, b, lam):
    return lam * F.cross_entropy(z, a) + (1 - lam) * F.cross_entropy(z, b)


def soft_targets(z, a, b, lam):
    one_hot_a, one_hot_b = (F.one_hot(labels, z.shape[1]).to(z.dtype) for labels in (a, b))
    target = lam * one_hot_a + (1 - lam) * one_hot_b
    return F.cross_entropy(z, target.movedim(-1, 1))


def timm():
    """timm's of rows: its partner is the batch in reverse, and so is b."""
    make_target = load("timm.data.mixup").mixup_target
    loss = load("timm.loss").SoftTargetCrossEntropy()
    return lambda z, a, b, lam: loss(z, make_target(a, z.shape[1], lam))


# A function of the logits, two labels and lam.
CONTESTANTS = {
    "two-term loss": lambda: two_terms,
    "regfast": lambda: lambda z, *mixed: mixup_cross_entropy(z, mixed),
    "torch, soft targets": lambda: soft_targets,
    "timm, soft targets": timm,
}
CONTESTANTS |= compiled(CONTESTANTS, "regfast", "two-term loss")


def draw(shape, format, dtype):
    rows, classes, *positions = shape
    z = images(shape, format, dtype)
    a = torch.randint(classes, (rows, *positions), device=z.device)
    return z, a, a.flip(0), torch.tensor(0.3, device=z.device)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "format"), LOGITS, ids=str)
def test_mixup_cross_entropy(benchmark, ready, shape, format, dtype, direction, contestant):
    if contestant == "timm, soft targets" and shape in MAPS:
        pytest.skip("timm's loss is of rows of logits")
    step = CONTESTANTS[contestant]()
    benchmark(ready(step, lambda: draw(shape, format, dtype), direction, rereads=True))
