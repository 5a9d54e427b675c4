"""Who is timed against MixUp: its blend, its loss, manifold mixup, and whole training steps.

Everyone mixes with the same lam. Who can be told it and the partners takes them from the inputs. timm, torchvision, kornia and
ManifoldMixup draw their own in every call, which is what a call of them costs, one-hot labels included; what they drew for lam
is then replaced by `LAM`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from contest import FORMATS, Bytes, Case, Maker, Operation, compiled, compiled_network, compiled_reference, images
from peers import AbsentError, load
from torch import Tensor, nn

import regfast
from regfast.functional import mixup, mixup_cross_entropy

LAM, ALPHA, CLASSES = 0.3, 0.25, 10

# Of a batch, its labels, its partners and lam: the batch and the target mixed.
Mix = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]]
Loss = Callable[[Tensor, Any], Tensor]


def seeds_blend(x: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    return lam * x + (1 - lam) * x[index, :]


def seeds_mix(x: Tensor, y: Tensor, index: Tensor, lam: Tensor) -> tuple[Tensor, Any]:
    return seeds_blend(x, index, lam), (y, y[index], lam)


def two_terms(z: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    a, b, lam = target
    return lam * F.cross_entropy(z, a) + (1 - lam) * F.cross_entropy(z, b)


def regfast_mix(x: Tensor, y: Tensor, index: Tensor, lam: Tensor) -> tuple[Tensor, Any]:
    return mixup(x, index, lam), regfast.MixedTarget(y, y[index], lam)


def timm_mix() -> Mix:
    """timm's, which writes to the batch that it is given."""

    class Mixup(load("timm.data").Mixup):  # type: ignore[misc]
        def _params_per_batch(self) -> tuple[float, bool]:
            super()._params_per_batch()
            return LAM, False

    mixer = Mixup(mixup_alpha=ALPHA, label_smoothing=0.0, num_classes=CLASSES)
    return lambda x, y, index, lam: mixer(x, y)


def on_a_copy(mix: Mix) -> Mix:
    """A mix that writes to its batch, given one of its own.

    That is copied once, as nobody who mixes in place copies it; but where the batch is differentiated, each time.
    """
    own: dict[int, Tensor] = {}

    def call(x: Tensor, y: Tensor, index: Tensor, lam: Tensor) -> tuple[Tensor, Any]:
        if x.requires_grad and torch.is_grad_enabled():
            return mix(x.clone(), y, index, lam)
        if x.data_ptr() not in own:
            own[x.data_ptr()] = x.detach().clone()
        return mix(own[x.data_ptr()], y, index, lam)

    return call


def torchvision_mix() -> Mix:
    class MixUp(load("torchvision.transforms.v2").MixUp):  # type: ignore[misc]
        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            super().make_params(flat_inputs)
            return dict(lam=LAM)

    mixer = MixUp(alpha=ALPHA, num_classes=CLASSES)
    return lambda x, y, index, lam: mixer(x, y)


def kornia_mix() -> Mix:
    # Its lambda is uniform, and the partner's weight.
    draws = dict(lambda_val=(1 - LAM, 1 - LAM), same_on_batch=True)
    mixer = load("kornia.augmentation").RandomMixUpV2(**draws, data_keys=["input", "class"])
    return lambda x, y, index, lam: mixer(x, y)


def soft_loss(z: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(z, target.to(z.dtype))


def timm_loss(z: Tensor, target: Tensor) -> Tensor:
    return load("timm.loss").SoftTargetCrossEntropy()(z, target)


def kornia_loss(z: Tensor, target: Tensor) -> Tensor:
    """What kornia's documentation gives for its labels, (a, b, lambda) in the columns of one tensor."""
    a, b, lam = target[:, 0].long(), target[:, 1].long(), target[:, 2]
    return ((1 - lam) * F.cross_entropy(z, a, reduction="none") + lam * F.cross_entropy(z, b, reduction="none")).mean()


def blend_of(make_mix: Callable[[], Mix]) -> Maker:
    """The blend alone, of any labels."""

    def make(case: Case) -> Callable[..., Tensor]:
        mix = make_mix()
        return lambda x, index, lam: mix(x, torch.zeros_like(index), index, lam)[0]

    return make


def normalised(x: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """What people write by hand before they mix."""
    channels = (1, -1, 1, 1)
    return x.float().div_(255).sub_(mean.view(channels)).div_(std.view(channels)).to(dtype)


def after_normalising(make_blend: Maker) -> Maker:
    def make(case: Case) -> Callable[..., Tensor]:
        blend = make_blend(case)
        return lambda x, index, lam, mean, std: blend(normalised(x, mean, std, case.torch_dtype), index, lam)

    return make


def regfast_from_bytes(
    x: Tensor, index: Tensor, lam: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    return mixup(x, index, lam, mean=mean, std=std, dtype=dtype)


def regfast_loss(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    return mixup_cross_entropy(z, (a, b, lam))


def two_term_loss(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    return two_terms(z, (a, b, lam))


def soft_targets(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    one_hot_a, one_hot_b = (F.one_hot(labels, z.shape[1]).to(z.dtype) for labels in (a, b))
    target = lam * one_hot_a + (1 - lam) * one_hot_b
    return F.cross_entropy(z, target.movedim(-1, 1))


def timm_soft_targets(case: Case) -> Callable[..., Tensor]:
    if len(case.shape) != 2:
        raise AbsentError("its loss is of rows of logits")
    make_target, loss = load("timm.data.mixup").mixup_target, load("timm.loss").SoftTargetCrossEntropy()
    # Its partner is the batch in reverse, and so is b.
    return lambda z, a, b, lam: loss(z, make_target(a, z.shape[1], lam))


class Step(nn.Module):
    """A network's loss of a batch that is mixed before it."""

    def __init__(self, network: nn.Module, mix: Mix, loss: Loss) -> None:
        super().__init__()
        self.network, self.mix, self.loss = network, mix, loss

    def forward(self, x: Tensor, y: Tensor, index: Tensor, lam: Tensor) -> Tensor:
        x, target = self.mix(x, y, index, lam)
        return self.loss(self.network(x), target)


class TwoPrefixes(nn.Module):
    """The blog's manifold mixup: all up to a layer runs on the batch, and again on its partners."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        names, children = zip(*network.named_children())
        cut = names.index(layer) + 1
        self.prefix = nn.Sequential(*children[:cut])
        self.rest = nn.Sequential(*children[cut:-1], nn.Flatten(), children[-1])

    def forward(self, x: Tensor, y: Tensor, index: Tensor, lam: Tensor) -> Tensor:
        hidden = lam * self.prefix(x) + (1 - lam) * self.prefix(x[index, :])
        return two_terms(self.rest(hidden), (y, y[index], lam))


class OnePrefix(TwoPrefixes):
    """The same with one run of the prefix, and the seeds' expression."""

    def forward(self, x: Tensor, y: Tensor, index: Tensor, lam: Tensor) -> Tensor:
        hidden, target = seeds_mix(self.prefix(x), y, index, lam)
        return two_terms(self.rest(hidden), target)


class Manifold(nn.Module):
    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network = regfast.ManifoldMixup(network, [layer], include_input=False, alpha=ALPHA)
        self.loss = regfast.MixupCrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor, index: Tensor, lam: Tensor) -> Tensor:
        return self.loss(*self.network(x, y))


def network(case: Case) -> nn.Module:
    """A ResNet-18 with the same weights every time."""
    models = load("torchvision.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.resnet18(num_classes=CLASSES).to(memory_format=FORMATS[case.format])


def step_of(make_mix: Callable[[], Mix], loss: Loss) -> Maker:
    return lambda case: Step(network(case), make_mix(), loss)


def partners(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randperm(case.shape[0], device=device), torch.tensor(LAM, device=device)


def blended(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    return (*images(case, device), *partners(case, device))


def bytes_blended(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    x = torch.randint(256, case.shape, dtype=torch.uint8, device=device).contiguous(memory_format=FORMATS[case.format])
    mean, std = (torch.linspace(*ends, case.shape[1], device=device) for ends in ((0.485, 0.406), (0.229, 0.225)))
    return (x, *partners(case, device), mean, std)


def logits(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    rows, classes, *positions = case.shape
    a = torch.randint(classes, (rows, *positions), device=device)
    return (*images(case, device), a, a.flip(0), torch.tensor(LAM, device=device))


def labelled(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Images, which nobody differentiates by, and their labels."""
    x, y = images(case, device)[0].detach(), torch.randint(CLASSES, case.shape[:1], device=device)
    return (x, y, *partners(case, device))


def read_and_write(inputs: tuple[Tensor, ...], y: Tensor) -> Bytes:
    return Bytes(inputs[0].nbytes + y.nbytes, inputs[0].nbytes + y.nbytes)


def three_passes(inputs: tuple[Tensor, ...], y: Tensor) -> Bytes:
    """The forward reads the logits, the backward reads them and writes as much; with labels, and a log-sum-exp that is kept."""
    logits, a, b, _ = inputs
    of_rows = a.nbytes + b.nbytes + 4 * a.numel()
    return Bytes(logits.nbytes + of_rows, 2 * logits.nbytes + of_rows)


def same(function: Callable[..., Tensor]) -> Maker:
    """A contestant that is one function in every case."""
    return lambda case: function


# On the CPU a call takes milliseconds; on CUDA a batch is several times any L2. For traffic.py a block of every sample is half of
# one sample, as an L2 holds the blocks that are under way and a small part of the batch.
BATCHES = {
    "cpu": [(32, 3, 224, 224)],
    "cuda": [(512, 3, 224, 224), (256, 256, 56, 56)],
    "toy": [(4, 3, 13, 12)],
    "traffic": [(6, 16, 32, 48)],
}
LOGITS = {
    "cpu": [(1024, 1000)],
    "cuda": [(65536, 1000), (4096, 32000), (32, 21, 512, 512)],
    "toy": [(4, 10)],
    "traffic": [(48, 1000), (2, 21, 32, 64)],
}
STEPS = {"cpu": [(16, 3, 64, 64)], "cuda": [(256, 3, 224, 224)], "toy": [(4, 3, 32, 32)]}

PEERS = {"timm": timm_mix, "torchvision": torchvision_mix, "kornia": kornia_mix}

# In a compiled graph regfast's blend is its reference, so that "reference compiled" would be "regfast compiled".
MIXINGS = {
    "mixup": Operation(
        function=mixup,
        contestants={
            "seeds' code": same(seeds_blend),
            "regfast": same(mixup),
            "regfast compiled": compiled(same(mixup)),
            "timm": blend_of(lambda: on_a_copy(timm_mix())),
            "torchvision": blend_of(torchvision_mix),
            "kornia": blend_of(kornia_mix),
            "seeds' code compiled": compiled(same(seeds_blend)),
        },
        arguments=[()],
        shapes=BATCHES,
        inputs=blended,
        floor=read_and_write,
    ),
    "mixup_uint8": Operation(
        function=regfast_from_bytes,
        contestants={
            "seeds' code": after_normalising(same(seeds_blend)),
            "regfast": lambda case: partial(regfast_from_bytes, dtype=case.torch_dtype),
            "regfast compiled": compiled(lambda case: partial(regfast_from_bytes, dtype=case.torch_dtype)),
            **{name: after_normalising(blend_of(make_mix)) for name, make_mix in PEERS.items()},
            "seeds' code compiled": compiled(after_normalising(same(seeds_blend))),
        },
        arguments=[()],
        shapes=BATCHES | {"cuda": [(512, 3, 224, 224)]},
        inputs=bytes_blended,
        floor=read_and_write,
        directions=("forward",),
    ),
    "mixup_cross_entropy": Operation(
        function=regfast_loss,
        contestants={
            "two-term loss": same(two_term_loss),
            "regfast": same(regfast_loss),
            "regfast compiled": compiled(same(regfast_loss)),
            "reference compiled": compiled_reference(same(regfast_loss)),
            "torch, soft targets": same(soft_targets),
            "timm, soft targets": timm_soft_targets,
            "two-term loss compiled": compiled(same(two_term_loss)),
            "soft targets compiled": compiled(same(soft_targets)),
        },
        arguments=[()],
        shapes=LOGITS,
        inputs=logits,
        floor=three_passes,
    ),
    "manifold_mixup": Operation(
        function=None,
        contestants={
            "seeds' code": lambda case: TwoPrefixes(network(case), *case.arguments),
            "regfast": lambda case: Manifold(network(case), *case.arguments),
            "regfast compiled": compiled_network(lambda case: Manifold(network(case), *case.arguments)),
            "one prefix, seeds' code": lambda case: OnePrefix(network(case), *case.arguments),
            "seeds' code compiled": compiled_network(lambda case: TwoPrefixes(network(case), *case.arguments)),
        },
        arguments=[("layer2",)],
        shapes=STEPS,
        inputs=labelled,
        directions=("forward+backward",),
    ),
    "mixup_step": Operation(
        function=None,
        contestants={
            "seeds' code": step_of(lambda: seeds_mix, two_terms),
            "regfast": step_of(lambda: regfast_mix, regfast.MixupCrossEntropyLoss()),
            "regfast compiled": compiled_network(step_of(lambda: regfast_mix, regfast.MixupCrossEntropyLoss())),
            "timm": step_of(lambda: on_a_copy(timm_mix()), timm_loss),
            "torchvision": step_of(torchvision_mix, soft_loss),
            "kornia": step_of(kornia_mix, kornia_loss),
            "seeds' code compiled": compiled_network(step_of(lambda: seeds_mix, two_terms)),
        },
        arguments=[()],
        shapes=STEPS,
        inputs=labelled,
        directions=("forward+backward",),
    ),
}
