"""Manifold mixup: one prefix equals two, hooks are removed, a recomputation mixes the same way."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import pickle
import threading
import weakref
from collections import OrderedDict, namedtuple
from functools import partial

import models
import pytest
import torch
from peers import load
from scipy import stats
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import regfast
from regfast import ManifoldMixup, MixedTarget

# The blend rounds differently (its sum has one term less here), and float32 layers carry that on.
ROUNDING = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def torchvision():
    return load("torchvision")


@pytest.fixture(scope="module")
def timm():
    return load("timm")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(*shape, **kwargs):
    """A batch labelled by sample number, so that a target's b is the index."""
    return torch.randn(*shape, **kwargs), torch.arange(shape[0])


def two_prefixes(blocks, k, x, index, lam):
    """The blog's form: the first k blocks of x and of x[index], then the rest on their blend."""
    a, b = x, x[index]
    for block in blocks[:k]:
        a, b = block(a), block(b)
    mixed = (lam * a + (1 - lam) * b).to(a.dtype)
    for block in blocks[k:]:
        mixed = block(mixed)
    return mixed


def check_every_candidate(mm, blocks, x, y, calls=60, **tolerance):
    """Call until each candidate is drawn, against two prefixes; candidate k enters block k."""
    drawn = set()
    for _ in range(calls):
        output, target = mm(x, y)
        assert torch.equal(target.a, y) and target.lam == pytest.approx(mm.last_lam)
        expected = two_prefixes(blocks, mm.last_k, x, target.b, target.lam)
        torch.testing.assert_close(output, expected, **(tolerance or ROUNDING))
        drawn.add(mm.last_layer)
        if drawn == set(mm.candidates):
            return
    raise AssertionError(f"drawn in {calls} calls: {drawn}")


def resnet_blocks(model):
    pool = model.avgpool if hasattr(model, "avgpool") else model.global_pool
    stem = nn.Sequential(
        *itertools.takewhile(lambda child: child is not model.layer1, model.children())
    )
    return [
        stem,
        model.layer1,
        model.layer2,
        model.layer3,
        nn.Sequential(model.layer4, pool, nn.Flatten(), model.fc),
    ]


def mlp(width=8, classes=3):
    """A stem, three stages and a head."""
    stages = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(width, width), *stages, nn.Linear(width, classes))


def hooks(model):
    return [
        hook
        for m in model.modules()
        for table in (m._forward_hooks, m._forward_pre_hooks)
        for hook in table.values()
    ]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_one_prefix_equals_two_in_a_resnet(library, request):
    package = request.getfixturevalue(library)
    model = (
        package.models.resnet18(num_classes=10)
        if library == "torchvision"
        else package.create_model("resnet18", num_classes=10)
    )
    mm = ManifoldMixup(model)
    model.eval()
    assert mm.candidates == ("input", "stem", "layer1", "layer2", "layer3")
    check_every_candidate(mm, resnet_blocks(model), *batch(4, 3, 32, 32))


def test_the_prefix_runs_once():
    model = mlp()
    sizes = []
    model[0].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    mm = ManifoldMixup(model)
    for _ in range(10):
        mm(*batch(6, 8))
    assert sizes == [6] * 10


def test_a_plain_sequential():
    """Child stages are blocks; without stages a layer and the activations after it are one."""
    model = mlp()
    assert ManifoldMixup(model).candidates == ("input", "stem", "1", "2")
    layers = OrderedDict(
        a=nn.Linear(8, 8), b=nn.Tanh(), c=nn.Linear(8, 8), d=nn.Tanh(), e=nn.Linear(8, 3)
    )
    flat = nn.Sequential(layers)
    mm = ManifoldMixup(flat)
    assert mm.candidates == ("input", "b", "d")
    check_every_candidate(mm, [flat[:2], flat[2:4], flat[4:]], *batch(6, 8))
    assert ManifoldMixup(flat[:3]).candidates == ("input", "b")


def test_a_plain_sequential_with_one_activation_in_many_places():
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 3)
    )
    mm = ManifoldMixup(model)
    assert mm.candidates == ("input", "1", "3", "5")
    check_every_candidate(mm, [model[:2], model[2:4], model[4:6], model[6:]], *batch(6, 8))


def test_two_stages_count_where_nothing_within_them_does():
    stages = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    model = nn.Sequential(
        OrderedDict(stem=nn.Tanh(), a=stages[0], b=stages[1], head=nn.Linear(8, 3))
    )
    mm = ManifoldMixup(model)
    assert mm.candidates == ("input", "stem", "a")
    check_every_candidate(mm, [model[:1], model[1], model[2:]], *batch(6, 8))


def test_the_examples_networks():
    """The head has no candidate."""
    cnn, resnet = models.make("cnn", 3, 10, width=4), models.make("resnet", 3, 10, width=4)
    activations_and_poolings = ("input", "2", "6", "13", "16")
    assert ManifoldMixup(cnn).candidates == activations_and_poolings
    assert ManifoldMixup(regfast.antialias(cnn)).candidates == activations_and_poolings
    assert ManifoldMixup(resnet).candidates == ("input", "5", "13", "20", "28")
    check_runs(ManifoldMixup(resnet), torch.randn(4, 3, 16, 16))


QUARTERS = "blocks.0 blocks.3 blocks.6 blocks.9"
STAGES = "stem stages.0 stages.1 stages.2"
# A network of each family: arguments that make it small, the image size (0: a similar network
# runs), and its hidden candidates.
FAMILIES = {
    "timm resnet18": ({}, 32, "stem layer1 layer2 layer3"),
    "timm resnetv2_50": ({}, 32, STAGES),
    "timm resnext50_32x4d": ({}, 0, "stem layer1 layer2 layer3"),
    "timm vgg11_bn": ({"mlp_ratio": 0.1}, 32, "features.3 features.10 features.17 features.24"),
    "timm densenet121": (
        {},
        32,
        "stem features.transition1 features.transition2 features.transition3",
    ),
    "timm regnety_002": ({}, 32, "stem s1 s2 s3"),
    "timm efficientnet_b0": ({}, 32, "stem blocks.1 blocks.3 blocks.5"),
    "timm mobilenetv3_small_050": ({}, 32, "stem blocks.1 blocks.2 blocks.4"),
    "timm convnext_atto": ({}, 32, STAGES),
    "timm swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 2, "embed_dim": 24},
        64,
        "stem layers.0 layers.1 layers.2",
    ),
    "timm vit_tiny_patch16_224": ({"img_size": 32}, 32, QUARTERS),
    "timm eva02_tiny_patch14_224": ({"img_size": 28}, 28, QUARTERS),
    "timm mixer_s16_224": ({"img_size": 32}, 32, "blocks.0 blocks.2 blocks.4 blocks.6"),
    "timm hrnet_w18_small": ({}, 32, "stem stage2 stage3"),
    "timm poolformer_s12": ({}, 32, STAGES),
    "torchvision resnet18": ({}, 32, "stem layer1 layer2 layer3"),
    "torchvision resnext50_32x4d": ({}, 0, "stem layer1 layer2 layer3"),
    "torchvision wide_resnet50_2": ({}, 0, "stem layer1 layer2 layer3"),
    "torchvision resnet152": ({}, 0, "stem layer1 layer2 layer3"),
    "torchvision vgg11_bn": ({}, 0, "features.3 features.10 features.17 features.24"),
    "torchvision googlenet": (
        {"aux_logits": False, "init_weights": False},
        32,
        "inception3a inception4a inception4c inception4e",
    ),
    "torchvision densenet121": (
        {},
        32,
        "stem features.transition1 features.transition2 features.transition3",
    ),
    "torchvision regnet_y_400mf": (
        {},
        32,
        "stem trunk_output.block1 trunk_output.block2 trunk_output.block3",
    ),
    "torchvision shufflenet_v2_x0_5": ({}, 32, "conv1 stage2 stage3 stage4"),
    "torchvision efficientnet_b0": ({}, 32, "stem features.2 features.4 features.6"),
    "torchvision mobilenet_v3_small": ({}, 32, "features.1 features.4 features.6 features.9"),
    "torchvision convnext_tiny": ({}, 32, "stem features.2 features.4 features.6"),
    "torchvision swin_t": ({}, 32, "features.0 features.2 features.4 features.6"),
    "torchvision vit_b_16": (
        {"image_size": 32},
        32,
        " ".join(f"encoder.layers.encoder_layer_{i}" for i in (0, 3, 6, 9)),
    ),
}
# One small network per kind of trunk: stages of an nn.Sequential, blocks of a ModuleList, a list of
# layers.
QUICK = {
    "timm mobilenetv3_small_050",
    "timm eva02_tiny_patch14_224",
    "timm vit_tiny_patch16_224",
    "timm convnext_atto",
    "torchvision mobilenet_v3_small",
}


def network(name):
    library, name = name.split()
    return partial(
        load(library).create_model if library == "timm" else load("torchvision.models").get_model,
        name,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_candidates_of_every_family(name):
    """The ends of stages, spread over the depth: mostly four, none in the last stage or head."""
    options, _, hidden = FAMILIES[name]
    # (RegNet reads its widths from a tensor.)
    with torch.device("cpu" if "regnet_y" in name else "meta"):
        model = network(name)(**options)
    mm = ManifoldMixup(model)
    assert mm.candidates == ("input", *hidden.split())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in QUICK else pytest.mark.slow)
        for n, row in FAMILIES.items()
        if row[1]
    ],
)
def test_each_family_mixes_at_each_candidate(name):
    options, size, _ = FAMILIES[name]
    check_runs(
        ManifoldMixup(network(name)(**options, num_classes=7)), torch.randn(4, 3, size, size)
    )


def as_trained(model, x):
    """Eval mode, with the statistics of x and no weight zero.

    A deep network's outputs would otherwise be zero, and mix to nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        model.train()(x)
    model.eval()


def check_runs(mm, x):
    """Call until each candidate is drawn: no output is bare, or a blend of bare outputs.

    The call itself checks that each candidate runs once per forward.
    """
    as_trained(mm.model, x)
    with torch.no_grad():
        bare = mm.model(x)
    apart, y, drawn = 1e-3 * bare.abs().max(), torch.arange(len(x)), set()
    for _ in range(100):
        mixed, (_, index, lam) = mm(x, y)
        if mm.last_layer in drawn or index.equal(y):
            continue
        drawn.add(mm.last_layer)
        assert mixed.shape == bare.shape and mixed.isfinite().all()
        assert (mixed - bare).abs().max() > apart
        assert (mixed - (lam * bare + (1 - lam) * bare[index])).abs().max() > apart
        mm.zero_grad()
        mixed.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in mm.model.parameters())
        if drawn == set(mm.candidates):
            return
    raise AssertionError(f"drawn: {drawn}")


def test_a_vit_s_blocks(timm):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=5)
    mm = ManifoldMixup(model, ["blocks.0", "blocks.2"], include_input=False)

    def embed(x):
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))

    rest = nn.Sequential(model.blocks[3], model.norm)
    blocks = [
        lambda x: model.blocks[0](embed(x)),
        lambda x: model.blocks[2](model.blocks[1](x)),
        rest,
    ]
    for _ in range(8):
        x, y = batch(4, 3, 32, 32)
        output, target = mm(x, y)
        expected = model.forward_head(two_prefixes(blocks, mm.last_k + 1, x, target.b, target.lam))
        torch.testing.assert_close(output, expected, **ROUNDING)
    assert ManifoldMixup(model).candidates == ("input", "stem", "blocks.0", "blocks.1", "blocks.2")


@dataclasses.dataclass
class Features:
    hidden: torch.Tensor
    tokens: torch.Tensor
    scale: float


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    "pack,unpack",
    [
        (lambda h, ids: (h, ids), lambda out: out),
        (lambda h, ids: [h, ids], tuple),
        (lambda h, ids: Pair(h, ids), lambda out: (out.first, out.second)),
        (
            lambda h, ids: OrderedDict(h=h, rest={"ids": ids}),
            lambda out: (out["h"], out["rest"]["ids"]),
        ),
        (lambda h, ids: Features(h, ids, 0.5), lambda out: (out.hidden, out.tokens)),
    ],
    ids=["tuple", "list", "namedtuple", "dict", "dataclass"],
)
def test_layers_that_return_several_things(pack, unpack):
    """Floating-point batch tensors are blended; integers, shared tables and others are not."""
    ids, table = torch.arange(6), torch.randn(5, 8)

    class Layer(nn.Module):
        def forward(self, x):
            return pack((x, (table, None)), ids)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            out = self.layer(x)
            assert type(out) is type(pack(x, ids))
            (h, (kept, nothing)), same = unpack(out)
            assert kept is table and nothing is None and same is ids
            return h

    x, y = batch(6, 8)
    output, target = ManifoldMixup(Model(), ["layer"], include_input=False)(x, y)
    torch.testing.assert_close(output, target.lam * x + (1 - target.lam) * x[target.b])


def test_an_input_of_several_tensors_and_further_arguments():
    class Model(nn.Module):
        def forward(self, x, offset, *, scale):
            return x["a"] * scale + x["b"] + offset

    x, offset = {"a": torch.randn(6, 8), "b": torch.randn(6, 8)}, torch.randn(6, 8)
    mm = ManifoldMixup(Model(), [])
    output, (_, index, lam) = mm(x, torch.arange(6), offset, scale=3.0)
    whole = x["a"] * 3 + x["b"]
    torch.testing.assert_close(output, lam * whole + (1 - lam) * whole[index] + offset)
    assert torch.equal(mm.eval()(x, None, offset, scale=3.0), whole + offset)


@pytest.mark.parametrize("alpha", [0, 2.0])
@pytest.mark.parametrize("size", [0, 1, 5])
def test_batches_of_none_and_of_one(alpha, size):
    mm = ManifoldMixup(mlp(), alpha=alpha)
    x, y = batch(size, 8)
    for _ in range(8):
        output, target = mm(x, y)
        assert output.shape == (size, 3) and sorted(target.b) == list(range(size))
        assert mm.last_lam == 1 if alpha == 0 else 0 < mm.last_lam < 1
        if alpha == 0 or size == 1:
            torch.testing.assert_close(output, mm.model(x))


def test_eval_mode_is_the_bare_model():
    mm = ManifoldMixup(mlp())
    x, y = batch(6, 8)
    mm.eval()
    expected = mm.model(x)
    output, target = mm(x, y)
    assert torch.equal(output, expected) and target is y and torch.equal(mm(x), expected)
    assert mm.last_k is None and mm.last_layer is None and mm.last_lam is None


def test_the_model_itself_mixes_nothing():
    model = mlp()
    x, y = batch(6, 8)
    expected = model(x)
    mm = ManifoldMixup(model)
    mm(x, y)
    assert torch.equal(model(x), expected)


def test_dense_labels_and_a_training_step():
    mm = ManifoldMixup(mlp())
    x, y = torch.randn(6, 8), torch.rand(6, 3)
    output, target = mm(x, y)
    assert isinstance(target, MixedTarget)
    regfast.mixup_criterion(nn.CrossEntropyLoss(), output, *target).backward()
    assert all(p.grad is not None for p in mm.parameters())


def test_the_loss_takes_the_target():
    mm = ManifoldMixup(mlp())
    x, y = torch.randn(6, 8), torch.randint(3, (6,))
    output, target = mm(x, y)
    loss = regfast.MixupCrossEntropyLoss()
    torch.testing.assert_close(
        loss(output, target), regfast.mixup_criterion(nn.CrossEntropyLoss(), output, *target)
    )
    torch.testing.assert_close(loss(*mm.eval()(x, y)), nn.CrossEntropyLoss()(mm(x), y))


def test_no_grad_in_training_mode():
    mm = ManifoldMixup(mlp())
    with torch.no_grad():
        check_every_candidate(mm, [*mm.model[:3], mm.model[3:]], *batch(6, 8))


def test_activations_keep_autocast_s_dtype():
    mm = ManifoldMixup(mlp(), ["0", "1"], include_input=False)
    seen = []
    for name in ("1", "2"):
        mm.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args: seen.append(args[0].dtype)
        )
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            x, y = batch(6, 8)
            output, target = mm(x, y)
            expected = two_prefixes(
                [mm.model[0], mm.model[1], mm.model[2:]], mm.last_k + 1, x, target.b, target.lam
            )
            # One rounding of the blend to bfloat16, and its effect on later layers.
            torch.testing.assert_close(output, expected, rtol=2**-6, atol=2**-6)
    assert set(seen) == {torch.bfloat16}


def draws(mm, count, size=4):
    x, y = batch(size, 8)
    return [
        (mm.last_k, mm.last_lam, target.b.tolist())
        for _, target in (mm(x, y) for _ in range(count))
    ]


def test_candidates_are_alike_and_lam_is_beta():
    mm = ManifoldMixup(mlp(), alpha=0.4, generator=generator())
    ks, lams, _ = zip(*draws(mm, 1500))
    assert stats.chisquare([ks.count(k) for k in range(len(mm.candidates))]).pvalue > 0.01
    assert stats.kstest(lams, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def test_without_the_input():
    mm = ManifoldMixup(mlp(), include_input=False)
    assert mm.candidates == ("stem", "1", "2")
    x, y = batch(6, 8)
    for _ in range(20):
        output, target = mm(x, y)
        expected = two_prefixes(
            [mm.model[0], mm.model[1], mm.model[2], mm.model[3:]],
            mm.last_k + 1,
            x,
            target.b,
            target.lam,
        )
        torch.testing.assert_close(output, expected, **ROUNDING)


def test_draws_follow_the_seed():
    def seeded(seed):
        model = mlp()
        torch.manual_seed(seed)
        return draws(ManifoldMixup(model), 8)

    assert seeded(1) == seeded(1) != seeded(2)
    assert draws(ManifoldMixup(mlp(), generator=generator(3)), 8) == draws(
        ManifoldMixup(mlp(), generator=generator(3)), 8
    )

    mm, state = ManifoldMixup(mlp(), generator=generator(3)), torch.get_rng_state()
    mm(torch.zeros(4, 8), torch.arange(4))
    assert torch.equal(torch.get_rng_state(), state), (
        "a given generator is the only one that is drawn from"
    )


@pytest.mark.parametrize("given", [None, 7])
def test_a_resumed_run_goes_on_with_the_stream(given):
    def make(seed):
        return ManifoldMixup(mlp(), generator=None if given is None else generator(seed))

    mm = make(7)
    draws(mm, 5)
    saved = copy.deepcopy(mm.state_dict())
    expected = draws(mm, 8)
    other = make(8)
    assert other.load_state_dict(saved, strict=True)
    assert draws(other, 8) == expected
    assert {f"model.{name}" for name in mm.model.state_dict()} | {"_extra_state"} == set(saved)


def test_hooks_are_gone_when_it_is_closed_or_deleted():
    model = mlp()
    x, y = batch(6, 8)
    mm = ManifoldMixup(model)
    assert len(hooks(model)) == 3
    mm.close()
    mm.close()
    assert not hooks(model)
    with pytest.raises(RuntimeError, match="closed"):
        mm(x, y)
    assert torch.equal(mm.eval()(x), model(x))

    with ManifoldMixup(model) as mm:
        mm(x, y)
        assert hooks(model)
    assert not hooks(model)

    gc.disable()
    try:
        mm = ManifoldMixup(model)
        mm(x, y)
        alive = weakref.ref(mm)
        del mm
        # No reference cycle holds it, so it is freed without a collection.
        assert alive() is None and not hooks(model)
    finally:
        gc.enable()


def test_two_on_one_model():
    model = mlp()
    x, y = batch(6, 8)
    first, second = (
        ManifoldMixup(model, ["1"], include_input=False),
        ManifoldMixup(model, ["2"], include_input=False),
    )
    for mm, split in ((first, 2), (second, 3), (first, 2)):
        output, target = mm(x, y)
        torch.testing.assert_close(
            output,
            two_prefixes([model[:split], model[split:]], 1, x, target.b, target.lam),
            **ROUNDING,
        )
    first.close()
    assert len(hooks(model)) == 1
    second(x, y)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda mm: pickle.loads(pickle.dumps(mm))],
    ids=["deepcopy", "pickle"],
)
def test_copies_have_a_model_and_hooks_of_their_own(duplicate):
    mm = ManifoldMixup(mlp())
    draws(mm, 3)
    other = duplicate(mm)
    assert repr(other) == repr(mm) and len(hooks(other.model)) == len(hooks(mm.model)) == 3
    assert draws(other, 8) == draws(mm, 8)
    check_every_candidate(other, [*other.model[:3], other.model[3:]], *batch(6, 8))
    mm.close()
    assert not hooks(mm.model) and len(hooks(other.model)) == 3
    other(*batch(6, 8))
    assert not hooks(duplicate(mm).model)
    with pytest.raises(RuntimeError, match="closed"):
        duplicate(mm)(*batch(6, 8))


def test_a_copy_of_the_model_alone_mixes_nothing():
    """An exponential moving average of the weights makes such a copy."""
    mm = ManifoldMixup(mlp())
    average = copy.deepcopy(mm.model)

    class Both(nn.Module):
        def forward(self, x):
            return torch.stack([mm.model(x), average(x)])

    x, y = batch(6, 8)
    expected = average(x)
    mm.model.register_forward_hook(
        lambda module, args, output: torch.testing.assert_close(
            average(x), expected, rtol=0, atol=0
        )
    )
    for _ in range(5):
        mm(x, y)
    pickle.dumps(average)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.linear(x)))


class Stage(nn.Sequential):
    """Blocks, each in its own checkpoint if `run` is set."""

    run = None

    def forward(self, x):
        for block in self:
            x = block(x) if self.run is None else self.run(block, x)
        return x


class Net(nn.Module):
    """A stem, three stages and a head, with checkpoints where `placement` says."""

    def __init__(self, placement="nowhere", run=checkpoint, outer=None):
        super().__init__()
        self.placement, self.run, self.outer = placement, run, outer or run
        self.stem = nn.Linear(8, 8)
        self.stage1, self.stage2, self.stage3 = (Stage(Block(), Block()) for _ in range(3))
        self.head = nn.Linear(8, 3)
        if placement == "blocks within a stage":
            for stage in (self.stage1, self.stage2, self.stage3):
                stage.run = run

    def forward(self, x):
        stages = (self.stem, self.stage1, self.stage2, self.stage3)
        if self.placement in ("nowhere", "blocks within a stage"):
            x = nn.Sequential(*stages)(x)
        elif self.placement == "each stage":
            for stage in stages:
                x = self.run(stage, x)
        elif self.placement == "a function of two stages":
            for pair in (stages[:2], stages[2:]):
                x = self.run(lambda x, pair=pair: pair[1](pair[0](x)), x)
        elif self.placement == "all":
            x = self.run(nn.Sequential(*stages), x)
        elif self.placement == "nested":
            x = self.outer(self.nested, x)
        elif self.placement == "round a stage's call":
            for block in (self.stem, *self.stage1, *self.stage2, *self.stage3):
                x = self.run(block, x)
        return self.head(x)

    def nested(self, x):
        for stage in (self.stem, self.stage1, self.stage2, self.stage3):
            x = self.run(stage, x)
        return x


REENTRANT = [partial(checkpoint, use_reentrant=flag) for flag in (False, True)]
PLACEMENTS = [
    "blocks within a stage",
    "each stage",
    "a function of two stages",
    "all",
    "round a stage's call",
]


def twins(layers, **placement):
    """The same model and draws, without and with checkpoints."""
    plain, checkpointed = Net().double(), Net(**placement).double()
    checkpointed.load_state_dict(plain.state_dict())
    return [ManifoldMixup(model, layers, generator=generator(1)) for model in (plain, checkpointed)]


def gradients(mm, order, forwards=4, call=None):
    """Several forwards, one of the bare model among them, then their backwards."""
    mm.zero_grad()
    torch.manual_seed(2)
    losses, inputs = [], []
    for i in range(forwards):
        x, y = batch(6, 8, dtype=torch.float64, requires_grad=True)
        inputs.append(x)
        output = mm.model(x) if i == 1 else (mm(x, y) if call is None else call(mm, x, y))[0]
        losses.append((output * torch.randn(3)).sum().square())
    if order == "summed":
        sum(losses).backward()
    elif order == "in a thread":
        # A CUDA device's backwards run on another thread, which numbers its autograd nodes from
        # zero.
        thread = threading.Thread(target=sum(losses).backward)
        thread.start()
        thread.join()
    else:
        for loss in losses if order == "in turn" else reversed(losses):
            loss.backward()
    return [t.grad for t in (*mm.parameters(), *inputs)]


def check_gradients(plain, checkpointed, steps=4, **kwargs):
    for _, order in itertools.product(
        range(steps), ("in turn", "reversed", "summed", "in a thread")
    ):
        for ours, expected in zip(
            gradients(checkpointed, order, **kwargs), gradients(plain, order)
        ):
            # The same sums, in another order where gradients accumulate.
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("run", REENTRANT, ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_recomputation_replays_the_mix_of_its_forward(placement, run):
    """Several forwards are alive; their backwards run in any order."""
    blocks = placement in ("blocks within a stage", "round a stage's call")
    layers = ["stem", "stage1.1", "stage2.1"] if blocks else ["stem", "stage1", "stage2"]
    check_gradients(*twins(layers, placement=placement, run=run))


@pytest.mark.parametrize(
    "run,outer", list(itertools.product(REENTRANT, REENTRANT)), ids=["nn", "nr", "rn", "rr"]
)
def test_checkpoints_within_checkpoints(run, outer):
    check_gradients(*twins(["stem", "stage1", "stage2"], placement="nested", run=run, outer=outer))


@pytest.mark.parametrize("run", REENTRANT, ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_round_the_whole_call(run):
    plain, checkpointed = twins(["stem", "stage1", "stage2"])

    def call(mm, x, y):
        return run(lambda x, y: (mm(x, y)[0],), x, y)

    check_gradients(plain, checkpointed, call=call)
    assert (plain.last_k, plain.last_lam) == (checkpointed.last_k, checkpointed.last_lam)


def test_a_checkpoint_without_the_generator_s_state():
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    plain, checkpointed = twins(["stem", "stage1", "stage2"], placement="all", run=run)
    for mm in (plain, checkpointed):
        for module in filter(lambda module: isinstance(module, nn.Dropout), mm.modules()):
            module.p = 0.0
    check_gradients(plain, checkpointed)


def test_a_mix_that_was_forgotten_is_an_error(monkeypatch):
    monkeypatch.setattr("regfast.manifold._REMEMBERED", 2)
    mm = twins(["stem"], placement="all", run=REENTRANT[0])[1]
    with pytest.raises(RuntimeError, match="2 forwards old"):
        gradients(mm, "in turn", forwards=4)
    gradients(mm, "in turn", forwards=3)


def test_checkpoints_that_go_round_a_stage_s_own_call_are_named():
    mm = ManifoldMixup(Net("round a stage's call", REENTRANT[0]), ["stem", "stage1", "stage2"])
    with pytest.raises(
        RuntimeError,
        match=r"'stage1', 'stage2' never ran.*last block.*\['stem', 'stage1.1', 'stage2.1'\]",
    ):
        mm(*batch(6, 8))


def test_timm_s_checkpointing(timm):
    model = timm.create_model("resnet18", num_classes=10).eval()
    model.set_grad_checkpointing()
    x, y = batch(4, 3, 32, 32)
    with pytest.raises(RuntimeError) as raised:
        ManifoldMixup(model)(x, y)
    layers = ["maxpool", "layer1.1", "layer2.1", "layer3.1"]
    assert "'layer1', 'layer2', 'layer3' never ran" in str(
        raised.value
    ) and f"layers={layers}" in str(raised.value)

    def step(enable):
        mm = ManifoldMixup(model, layers, generator=generator())
        model.eval().set_grad_checkpointing(enable)
        model.zero_grad()
        torch.stack([mm(x, y)[0].sum() for _ in range(3)]).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for ours, expected in zip(step(True), step(False)):
        torch.testing.assert_close(ours, expected, **ROUNDING)


def test_timm_s_checkpointing_of_nested_stages(timm):
    """A stage's replacement has its full path, also as its parent's first child."""
    model = timm.create_model("efficientnet_b0", num_classes=10).eval()
    model.set_grad_checkpointing()
    x, y = batch(4, 3, 32, 32)
    with pytest.raises(
        RuntimeError, match=r"'stem', 'blocks\.1', 'blocks\.3', 'blocks\.5' never ran"
    ) as raised:
        ManifoldMixup(model)(x, y)
    layers = ["bn1", "blocks.1.1", "blocks.3.2", "blocks.5.3"]
    assert f"layers={layers}" in str(raised.value)
    assert ManifoldMixup(model, layers)(x, y)[0].shape == (4, 10)


def test_a_gradient_within_the_forward_is_no_second_run():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net("each stage", REENTRANT[0])

        def forward(self, x):
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    mm = ManifoldMixup(Energy(), ["net.stage1", "net.stage2"], include_input=False)
    x, y = batch(6, 8, requires_grad=True)
    mm(x, y)[0].sum().backward()
    assert mm.model.net.stem.weight.grad is not None


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("layers", [None, ["0", "1"], ["module.0", "module.1"]], ids=str)
def test_around_distributed_data_parallel(process_group, layers):
    model = mlp()
    mm = ManifoldMixup(DistributedDataParallel(model), layers)
    assert mm.candidates == ("input", *(layers or ("stem", "1", "2")))
    check_every_candidate(mm, [*model[:3], model[3:]], *batch(6, 8))
    mm(*batch(6, 8))[0].sum().backward()


def test_within_distributed_data_parallel(process_group):
    mm = ManifoldMixup(mlp())
    parallel = DistributedDataParallel(mm)
    for _ in range(5):
        x, y = batch(6, 8)
        output, target = parallel(x, y)
        assert isinstance(target, MixedTarget)
        blocks = [*mm.model[:3], mm.model[3:]]
        torch.testing.assert_close(
            output, two_prefixes(blocks, mm.last_k, x, target.b, target.lam), **ROUNDING
        )
        output.sum().backward()


def train_in_a_group(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    mm = ManifoldMixup(mlp())
    parallel = DistributedDataParallel(mm)
    x, y = batch(16, 8)
    drawn = []
    for _ in range(4):
        output, target = parallel(x, y)
        output.square().sum().backward()
        drawn.append((mm.last_k, mm.last_lam, target.b.tolist()))
    torch.save((drawn, [p.grad for p in mm.parameters()]), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_draw_apart_and_train_together(tmp_path):
    torch.multiprocessing.spawn(train_in_a_group, (str(tmp_path),), nprocs=2)
    (first, gradients_0), (second, gradients_1) = (
        torch.load(tmp_path / str(rank)) for rank in range(2)
    )
    assert all(a[1] != b[1] and a[2] != b[2] for a, b in zip(first, second))
    assert all(map(torch.equal, gradients_0, gradients_1))


def test_a_compiled_model():
    """One graph per candidate; each call draws anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = mlp()
    mm = ManifoldMixup(torch.compile(model, backend=backend, fullgraph=True))
    assert mm.candidates == ("input", "stem", "1", "2")
    blocks = [*model[:3], model[3:]]
    for _ in range(4):
        check_every_candidate(mm, blocks, *batch(6, 8))
    assert len(graphs) == len(mm.candidates)
    x = torch.randn(6, 8)
    torch.testing.assert_close(mm.model(x), model(x))
    torch.testing.assert_close(mm.eval()(x), model(x))


def test_a_compiled_manifold_mixup():
    torch.compiler.reset()
    mm = ManifoldMixup(mlp())
    compiled = torch.compile(mm, backend="eager")
    for _ in range(12):
        x, y = batch(6, 8)
        output, target = compiled(x, y)
        expected = two_prefixes([*mm.model[:3], mm.model[3:]], mm.last_k, x, target.b, target.lam)
        torch.testing.assert_close(output, expected, **ROUNDING)


def test_a_model_that_was_compiled_before_is_an_error():
    torch.compiler.reset()
    model = torch.compile(mlp(), backend="eager")
    x, y = batch(6, 8)
    model(x)
    with pytest.raises(RuntimeError, match=r"'1', '2' never ran.*torch\.compiler\.reset"):
        for _ in range(10):
            ManifoldMixup(model)(x, y)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.layer(x))


class Transposed(nn.Module):
    """Contains a layer with the batch last, and a layer that returns no tensor."""

    def __init__(self):
        super().__init__()
        self.turn, self.shape = Turn(), Shape()

    def forward(self, x):
        self.shape(x)
        return self.turn(x)


class Turn(nn.Module):
    def forward(self, x):
        return x.T


class Shape(nn.Module):
    def forward(self, x):
        return x.shape[1]


X, Y = torch.randn(6, 8), torch.arange(6)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda: ManifoldMixup("model"), TypeError, ["model", "str", "nn.Module"]),
        (lambda: ManifoldMixup(mlp(), "1"), TypeError, ["layers", "'1'", "sequence"]),
        (lambda: ManifoldMixup(mlp(), [1]), TypeError, ["layers", "[1]", "sequence"]),
        (lambda: ManifoldMixup(mlp(), [""]), ValueError, ["layers", "''", "children", "'4'"]),
        (
            lambda: ManifoldMixup(Net(), ["stage11"]),
            ValueError,
            ["'stage11'", "did you mean", "'stage1'"],
        ),
        (
            lambda: ManifoldMixup(Net(), ["zzz"]),
            ValueError,
            ["'zzz'", "children", "'stem'", "'head'"],
        ),
        (lambda: ManifoldMixup(Net(), ["stem", "stage1", "stem"]), ValueError, ["'stem'", "once"]),
        (
            lambda: ManifoldMixup(Net(), [], include_input=False),
            ValueError,
            ["layers", "[]", "include_input"],
        ),
        (
            lambda: ManifoldMixup(Twice()),
            ValueError,
            ["layers", "Twice", "nn.Sequential", "'layer', 'unused'"],
        ),
        (
            lambda: ManifoldMixup(mlp(), include_input=1),
            TypeError,
            ["include_input", "1", "True or False"],
        ),
        (lambda: ManifoldMixup(mlp(), alpha=-1), ValueError, ["alpha", "-1", "at least 0"]),
        (lambda: ManifoldMixup(mlp(), alpha="big"), TypeError, ["alpha", "'big'", "number"]),
        (lambda: ManifoldMixup(mlp(), generator=3), TypeError, ["generator", "int"]),
        (lambda: ManifoldMixup(mlp())(X), TypeError, ["y", "NoneType", "training"]),
        (lambda: ManifoldMixup(mlp())(X, [0] * 6), TypeError, ["y", "list", "Tensor"]),
        (lambda: ManifoldMixup(mlp())(X, Y[:5]), ValueError, ["(6, ...)", "(5,)"]),
        (lambda: ManifoldMixup(mlp())(X, Y[0]), ValueError, ["(6, ...)", "()"]),
        (
            lambda: ManifoldMixup(Turn(), [])(X.long(), Y),
            ValueError,
            ["candidate", "torch.int64", "include_input=False", "floating"],
        ),
        (
            lambda: ManifoldMixup(Turn(), [])([X[:3]], Y),
            ValueError,
            ["'input'", "list", "(3, 8)", "batch, 6"],
        ),
        (lambda: ManifoldMixup(Twice(), ["layer"])(X, Y), RuntimeError, ["'layer'", "twice"]),
        (lambda: ManifoldMixup(Twice(), ["unused"])(X, Y), RuntimeError, ["'unused'", "never ran"]),
        (
            lambda: ManifoldMixup(Transposed(), ["turn"], include_input=False)(X, Y),
            ValueError,
            ["'turn'", "(8, 6)", "batch, 6"],
        ),
        (
            lambda: ManifoldMixup(Transposed(), ["shape"], include_input=False)(X, Y),
            ValueError,
            ["'shape'", "int", "batch, 6"],
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_generator_of_the_device_is_refused():
    with pytest.raises(ValueError, match=r"cpu.*cuda"):
        ManifoldMixup(mlp(), generator=torch.Generator("cuda"))


def test_a_call_that_failed_leaves_nothing_behind():
    mm = ManifoldMixup(mlp(), ["0", "1"], include_input=False)
    x, y = batch(6, 8)
    with pytest.raises(RuntimeError):
        mm(x[:, :3], y)
    assert torch.equal(mm.model(x), mm.eval()(x))
    mm.train()(x, y)


def test_the_seeds_resnet18mm(torchvision):
    from resnet18mm import Resnet18MM

    model = Resnet18MM(num_classes=10)
    model.eval()
    x = torch.randn(4, 3, 32, 32)
    output, index, lam = model(x)
    assert torch.equal(output, model.manifold.model(x)) and index is None and lam is None
    blocks = resnet_blocks(model.manifold.model)
    drawn = set()
    for _ in range(60):
        output, index, lam = model(x, mixup=True)
        assert lam == model.last_lam and sorted(index) == list(range(4))
        torch.testing.assert_close(
            output, two_prefixes(blocks, model.last_k, x, index, lam), **ROUNDING
        )
        drawn.add(model.last_k)
        if drawn == set(range(5)):
            break
    assert drawn == set(range(5))
    model.train()
    regfast.mixup_criterion(
        nn.CrossEntropyLoss(), model(x, True)[0], torch.arange(4), index, lam
    ).backward()
