"""`fuse` replaces other libraries' blurs by regfast's, the same function; `restore` undoes it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from peers import load
from torch import nn
from torch.nn import functional as F

import regfast
from regfast import antialias, antialias_report, fuse, restore

# float32 sums of up to 49 products of order one, in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-5)
CHANNELS = 4


def peer(library: str, name: str):
    """A class of another library; skips the test where it is absent."""
    module = {"timm": "timm.layers", "kornia": "kornia.filters"}.get(library, library)
    return getattr(load(module), name)


def named_as(module: str):
    """Gives a stand-in the module of the class of its name."""

    def set_module(kind):
        kind.__module__, kind.__qualname__ = module, kind.__name__
        return kind

    return set_module


def zero_padded(x: torch.Tensor, filters: torch.Tensor, stride) -> torch.Tensor:
    filters = filters.expand(x.shape[1], -1, -1, -1)
    return F.conv2d(x, filters, stride=stride, padding=filters.shape[-1] // 2, groups=x.shape[1])


TRIANGLE = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1]))[None, None] / 16


class Composer:
    """Stand-ins for Composer's layers, with their attributes, buffers and functions."""

    @named_as("composer.algorithms.blurpool.blurpool_layers")
    class BlurPool2d(nn.Module):
        def __init__(self, stride=2, padding=1):
            super().__init__()
            self.stride, self.padding = stride, padding
            self.register_buffer("filt2d", TRIANGLE.clone())

        def forward(self, input):
            return zero_padded(input, self.filt2d, self.stride)

    @named_as("composer.algorithms.blurpool.blurpool_layers")
    class BlurMaxPool2d(nn.Module):
        def __init__(self, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
            super().__init__()
            self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
            self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode
            self.register_buffer("filt2d", TRIANGLE.clone())

        def forward(self, input):
            maxima = F.max_pool2d(
                input, self.kernel_size, 1, self.padding, self.dilation, self.ceil_mode
            )
            return zero_padded(maxima, self.filt2d, self.stride)

    @named_as("composer.algorithms.blurpool.blurpool_layers")
    class BlurConv2d(nn.Module):
        def __init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0,
            blur_first=True,
            **arguments,
        ):
            super().__init__()
            self.blur_first, self.blur_stride = blur_first, 1 if blur_first else stride
            taken = stride if blur_first else 1
            self.conv = nn.Conv2d(
                in_channels, out_channels, kernel_size, taken, padding, **arguments
            )
            blurred = in_channels if blur_first else out_channels
            self.register_buffer("blur_filter", TRIANGLE.repeat(blurred, 1, 1, 1))

        def forward(self, input):
            if self.blur_first:
                return self.conv.forward(zero_padded(input, self.blur_filter, self.blur_stride))
            return zero_padded(self.conv.forward(input), self.blur_filter, self.blur_stride)


def layers_of(library: str):
    """Layers of every size, stride and border, in groups, each with the class that replaces it."""
    if library == "timm":
        blur = peer("timm", "BlurPool2d")
        for size in range(2, 8):
            for stride in (1, 2, 3):
                yield blur(None, size, stride), regfast.BlurPool2d
        yield blur(CHANNELS, 3), regfast.BlurPool2d
        yield blur(CHANNELS, 4, pad_mode="constant"), regfast.BlurPool2d
        yield blur(None, 5, pad_mode="replicate"), regfast.BlurPool2d
    if library == "antialiased_cnns":
        blur = peer(library, "BlurPool")
        for size in range(1, 8):
            for stride in (1, 2, 3):
                yield blur(CHANNELS, filt_size=size, stride=stride), regfast.BlurPool2d
        for pad_type in ("refl", "repl", "replicate", "zero"):
            yield blur(CHANNELS, pad_type), regfast.BlurPool2d
        yield blur(CHANNELS, filt_size=3, pad_off=1), regfast.BlurPool2d
        yield blur(CHANNELS, filt_size=1, pad_off=2), regfast.BlurPool2d
    if library == "kornia":
        blur, max_blur = peer(library, "BlurPool2D"), peer(library, "MaxBlurPool2D")
        for size in range(1, 8):
            for stride in (1, 2, 3):
                yield blur(size, stride), regfast.BlurPool2d
                yield max_blur(size, stride, 2 + stride % 2), regfast.MaxPool2dAA
    if library == "composer":
        yield from (
            (Composer.BlurPool2d(stride), regfast.BlurPool2d) for stride in (1, 2, 3, (2, 1))
        )
        for arguments in ((2,), (3, 2, 1), ((3, 2), (1, 2)), (3, 2, 1, 2), (3, 2, 0, 1, True)):
            yield Composer.BlurMaxPool2d(*arguments), regfast.MaxPool2dAA
        for first in (True, False):
            yield Composer.BlurConv2d(CHANNELS, 6, 3, 2, 1, first), nn.Sequential
            yield Composer.BlurConv2d(CHANNELS, 6, 1, (2, 2), 0, first, bias=False), nn.Sequential
            yield Composer.BlurConv2d(CHANNELS, CHANNELS, 3, 1, 1, first, groups=2), nn.Sequential


def check_same(found: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    """Outputs, and gradients of the input and of the parameters."""
    results = []
    for layer in (found, expected):
        leaf = x.clone().requires_grad_()
        # A layer may work in place, though not on a leaf.
        y = layer(leaf * 1)
        torch.manual_seed(1)
        weights = torch.randn_like(y)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], weights)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)


def check_state(model: nn.Module, plain: nn.Module) -> None:
    """Same keys, order and values, non-persistent buffers included."""
    for found, expected in (
        (model.state_dict(), plain.state_dict()),
        (dict(model.named_buffers()), dict(plain.named_buffers())),
        (dict(model.named_parameters()), dict(plain.named_parameters())),
    ):
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("library", ["timm", "antialiased_cnns", "kornia", "composer"])
def test_layers_are_the_same_function_with_the_same_state_and_come_back(library):
    for plain, kind in layers_of(library):
        layer = copy.deepcopy(plain)
        before = {key: value for key, value in layer.__dict__.items() if not key.startswith("_")}
        assert fuse(layer) is layer
        assert type(layer) is kind, str(antialias_report(layer))
        check_state(layer, plain)
        for shape in ((2, CHANNELS, 17, 14), (1, CHANNELS, 12, 13)):
            check_same(layer, plain, torch.randn(shape))
        restore(layer)
        assert type(layer) is type(plain) and not layer._load_state_dict_post_hooks
        after = {key: value for key, value in layer.__dict__.items() if not key.startswith("_")}
        assert after == before and layer.__dict__.keys() == plain.__dict__.keys()
        x = torch.randn(2, CHANNELS, 9, 10)
        assert torch.equal(layer(x), plain(x))


def test_signals_too():
    blur = peer("antialiased_cnns", "BlurPool1D")
    for size in range(1, 8):
        plain = blur(CHANNELS, filt_size=size)
        layer = fuse(copy.deepcopy(plain))
        assert type(layer) is regfast.BlurPool1d
        check_state(layer, plain)
        check_same(layer, plain, torch.randn(2, CHANNELS, 13))


BLURS = {
    "timm": lambda size=3, stride=2: peer("timm", "BlurPool2d")(None, size, stride),
    "antialiased_cnns": lambda size=3, stride=2: peer("antialiased_cnns", "BlurPool")(
        CHANNELS, filt_size=size, stride=stride
    ),
    "kornia": lambda size=3, stride=2: peer("kornia", "BlurPool2D")(size, stride),
    "composer": lambda size=3, stride=2: Composer.BlurPool2d(stride),
}
libraries = pytest.mark.parametrize("library", BLURS)


def types(model: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in model]


@libraries
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "pool", [(2, 1), (3, 1, 1), (3, 1, 1, 2), (2, 1, 1, 1, False, True)], ids=str
)
def test_a_maximum_and_a_relu_before_a_blur_are_folded(library, size, stride, pool):
    plain = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(*pool),
        BLURS[library](size, stride),
    )
    model = fuse(copy.deepcopy(plain))
    assert (
        types(model) == ["Conv2d", "Identity", "Identity", "MaxPool2dAA"]
        and model[3].activation == "relu"
    )
    check_state(model, plain)
    for sides in ((13, 16), (16, 13)):
        check_same(model, plain, torch.randn(2, 3, *sides))
        # Integers, for equal maxima and zeros.
        check_same(model[1:], plain[1:], torch.randint(-2, 3, (2, CHANNELS, *sides)).float())
    (row,) = [row for row in antialias_report(model) if row.done.startswith("fused")]
    assert row[:3] == ("3", "MaxPool2dAA", "fused max-blur pool") and row.why.endswith(
        ", with 1 and 2 before it"
    )
    assert repr(restore(model)) == repr(plain)


@libraries
def test_a_relu_before_a_blur_is_folded(library):
    plain = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(), BLURS[library]())
    model = fuse(copy.deepcopy(plain))
    assert types(model) == ["BatchNorm2d", "Identity", "BlurPool2d"]
    check_same(model, plain, torch.randn(2, CHANNELS, 9, 8))


def test_a_relu_before_a_max_blur_pool_is_folded():
    pools = (peer("kornia", "MaxBlurPool2D")(3), Composer.BlurMaxPool2d(3, 2, 1))
    plain = nn.Sequential(nn.ReLU(), pools[0], nn.ReLU(), pools[1])
    model = fuse(copy.deepcopy(plain))
    assert types(model) == ["Identity", "MaxPool2dAA"] * 2
    check_same(model, plain, torch.randn(2, CHANNELS, 19, 18))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    "before,expected",
    [
        (lambda: [nn.MaxPool2d(2, 2)], ["MaxPool2d", "BlurPool2d"]),
        (lambda: [hooked(nn.MaxPool2d(2, 1))], ["MaxPool2d", "BlurPool2d"]),
        (lambda: [hooked(nn.ReLU())], ["ReLU", "BlurPool2d"]),
        (lambda: [nn.ReLU6()], ["ReLU6", "BlurPool2d"]),
        (lambda: [nn.ReLU(), nn.BatchNorm2d(4)], ["ReLU", "BatchNorm2d", "BlurPool2d"]),
        # It writes into a tensor that is not the container's own.
        (lambda: [nn.ReLU(inplace=True)], ["ReLU", "BlurPool2d"]),
        (lambda: [nn.ReLU(inplace=True), nn.MaxPool2d(2, 1)], ["ReLU", "Identity", "MaxPool2dAA"]),
    ],
    ids=[
        "stride",
        "hook",
        "hook of a ReLU",
        "ReLU6",
        "between",
        "in place and first",
        "in place, first and a maximum",
    ],
)
def test_what_is_not_the_same_folded_stays(before, expected):
    plain = nn.Sequential(*before(), BLURS["kornia"]())
    model = fuse(copy.deepcopy(plain))
    assert types(model) == expected
    check_same(model, plain, torch.randn(2, CHANNELS, 9, 8))


def test_a_shared_blur_takes_nothing_in():
    blur = BLURS["kornia"]()
    plain = nn.ModuleList([nn.Sequential(nn.ReLU(), blur), nn.Sequential(nn.MaxPool2d(2, 1), blur)])
    model = fuse(copy.deepcopy(plain))
    assert types(model[0]) == ["ReLU", "BlurPool2d"] and model[0][1] is model[1][1]
    for found, expected in zip(model, plain):
        check_same(found, expected, torch.randn(2, CHANNELS, 9, 8))


def test_a_border_that_max_blur_pool_lacks_is_the_blur_s_alone():
    """timm pads a filter of even size equally on both sides."""
    plain = nn.Sequential(nn.MaxPool2d(2, 1), BLURS["timm"](4))
    model = fuse(copy.deepcopy(plain))
    assert types(model) == ["MaxPool2d", "BlurPool2d"] and model[1].padding == (2, 2)
    check_same(model, plain, torch.randn(2, CHANNELS, 9, 8))


def why(model: nn.Module) -> str:
    (row,) = antialias_report(fuse(model))
    assert row.done == "already blurred"
    return row.why


def test_layers_that_are_left_and_why():
    timm_blur, cnns_blur = peer("timm", "BlurPool2d"), peer("antialiased_cnns", "BlurPool")

    class Derived(timm_blur):
        pass

    reason = "it is a subclass, which may compute another function"
    assert why(Derived()) == f"by timm's BlurPool2d; regfast.fuse leaves it: {reason}"
    assert "no regfast layer has its border, ((2, 3), (2, 3))" in why(
        cnns_blur(CHANNELS, filt_size=4, pad_off=1)
    )
    assert "'circular'" in why(timm_blur(pad_mode="circular"))
    assert "meta" in why(timm_blur().to("meta"))
    patched = timm_blur()
    patched.forward = lambda x: x
    assert "its forward was replaced" in why(patched)
    doubled = timm_blur()
    doubled.filt.mul_(2)
    assert "its taps sum to 2" in why(doubled)
    odd = timm_blur(CHANNELS)
    odd.filt[0, 0, 0, 0] += 0.25
    odd.filt[0, 0, 2, 2] -= 0.25
    assert "no product of taps" in why(odd)
    watched = Composer.BlurConv2d(CHANNELS, 4, 3, 2)
    watched.conv.register_forward_hook(lambda *_: None)
    rows = {row.name: row.why for row in antialias_report(fuse(watched))}
    assert "its convolution has hooks" in rows["(the model)"]


@named_as("timm.layers.blur_pool")
class BlurPool2d(nn.Module):
    """A possible later version of timm's."""

    def __init__(self):
        super().__init__()
        self.stride, self.padding, self.pad_mode = 2, [1] * 4, "reflect"
        self.register_buffer("filt", TRIANGLE.clone(), persistent=False)

    def forward(self, x):
        return -zero_padded(x, self.filt, self.stride)


def test_a_version_that_computes_another_function_is_left():
    assert "in this version it computes another function" in why(BlurPool2d())


@named_as("kornia.filters.blur_pool")
class BlurPool2D(nn.Module):
    """kornia's before 0.9, which pads by (size - 1)//2 on both sides."""

    def __init__(self, kernel_size, stride=2):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.register_buffer(
            "kernel", torch.ones(kernel_size, kernel_size) / kernel_size**2, persistent=False
        )

    def forward(self, input):
        kernel = self.kernel.expand(input.shape[1], 1, -1, -1)
        return F.conv2d(
            input,
            kernel,
            padding=(self.kernel_size - 1) // 2,
            stride=self.stride,
            groups=input.shape[1],
        )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_an_older_kornia(size):
    plain = BlurPool2D(size)
    layer = fuse(copy.deepcopy(plain))
    assert type(layer) is regfast.BlurPool2d
    for sides in ((9, 8), (8, 9)):
        check_same(layer, plain, torch.randn(2, CHANNELS, *sides))


@pytest.mark.parametrize(
    "make",
    [lambda: BLURS["antialiased_cnns"](), Composer.BlurPool2d],
    ids=["antialiased_cnns", "composer"],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_the_taps_are_the_checkpoint_s(make, pooled):
    plain = nn.Sequential(*([nn.MaxPool2d(2, 1)] if pooled else []), make())
    model = fuse(copy.deepcopy(plain))
    blur, x = plain[-1], torch.randn(2, CHANNELS, 9, 8)
    (buffer,) = blur.buffers()
    buffer.copy_(torch.outer(torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.1, 0.8, 0.1])))
    model.load_state_dict(plain.state_dict(), strict=True)
    check_same(model, plain, x)
    again = copy.deepcopy(plain)
    restore(model)
    assert torch.equal(model(x), again(x))


def test_the_taps_of_a_convolution_are_the_checkpoint_s():
    plain = Composer.BlurConv2d(CHANNELS, 6, 3, 2, 1)
    model = fuse(copy.deepcopy(plain))
    plain.blur_filter.copy_(torch.full((3, 3), 1 / 9))
    model.load_state_dict(plain.state_dict(), strict=True)
    check_same(model, plain, torch.randn(2, CHANNELS, 9, 8))


def test_a_checkpoint_with_a_filter_that_is_no_regfast_blur_is_refused():
    model = fuse(nn.Sequential(Composer.BlurPool2d()))
    state = {"0.filt2d": torch.eye(3)[None, None] / 3}
    with pytest.raises(
        ValueError, match=r"no product of taps.*restore the model before it is loaded"
    ):
        model.load_state_dict(state)
    plain = restore(model)
    plain.load_state_dict(state)
    assert torch.equal(plain[0].filt2d, state["0.filt2d"])


def test_it_is_undone_and_done_once():
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(3, 1, 1),
        BLURS["kornia"](),
        nn.MaxPool2d(2),
    ).eval()
    objects, printed, x = list(model.modules()), repr(model), torch.randn(1, 16, 16, 16)
    expected = model(x)
    assert "already blurred  by kornia's BlurPool2D; see regfast.fuse" in str(
        antialias_report(model)
    )
    once, report = repr(fuse(model)), str(antialias_report(model))
    assert repr(fuse(model)) == once and str(antialias_report(model)) == report
    assert (
        report.endswith("0 anti-aliased, 1 fused, 1 left")
        and "call regfast.antialias to convert it" in report
    )
    antialias(model)
    assert str(antialias_report(model)).endswith("1 anti-aliased, 1 fused, 0 left")
    assert list(restore(model).modules()) == objects and repr(model) == printed
    assert torch.equal(model(x), expected) and not model[1].training


def test_hooks_and_flags_of_a_layer_are_kept():
    model, seen = nn.Sequential(BLURS["timm"]()), []
    model[0].register_forward_hook(
        lambda layer, args, y: seen.append((type(layer).__name__, y.shape))
    )
    fuse(model.eval())(torch.randn(1, 2, 8, 8))
    assert seen == [("BlurPool2d", (1, 2, 4, 4))] and not model[0].training


def test_a_stride_set_later_is_obeyed_and_stays():
    model, x = nn.Sequential(BLURS["timm"]()), torch.randn(1, 2, 8, 8)
    fuse(model)[0].stride = 1
    assert model(x).shape == (1, 2, 8, 8) and restore(model)[0].stride == 1


def test_a_fused_model_copies_and_pickles():
    plain = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1), BLURS["antialiased_cnns"]())
    model, x = fuse(copy.deepcopy(plain)), torch.randn(1, CHANNELS, 9, 9)
    changed = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1), BLURS["antialiased_cnns"]())
    changed[2].filt.fill_(1 / 9)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
        copied.load_state_dict(changed.state_dict(), strict=True)
        torch.testing.assert_close(copied(x), changed(x), **ROUNDING)
        assert repr(restore(copied)) == repr(plain)


@pytest.mark.parametrize("blur_first", [True, False])
def test_a_convolution_within_a_blur_is_not_blurred_again(blur_first):
    plain = Composer.BlurConv2d(16, 16, 3, 2, 1, blur_first)
    model, x = antialias(nn.Sequential(copy.deepcopy(plain))), torch.randn(1, 16, 9, 8)
    assert torch.equal(model(x), plain(x))
    rows = {row.name: (row.done, row.why) for row in antialias_report(model)}
    assert rows.pop("0") == ("already blurred", "by composer's BlurConv2d; see regfast.fuse")
    inner = {"0.conv": ("already blurred", "by composer's BlurConv2d")}
    assert rows == (inner if blur_first else {})
    check_same(fuse(model), plain, x)


def test_a_hooked_blur_takes_nothing_in():
    model, seen = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1), BLURS["timm"]()), []
    model[2].register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape))
    fuse(model)(torch.randn(1, 2, 8, 8))
    assert seen == [(1, 2, 7, 7)] and types(model) == ["ReLU", "MaxPool2d", "BlurPool2d"]


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="model must be a module, got list"):
        fuse([])
    with pytest.raises(ValueError, match=r"compiled: convert a model before torch\.compile"):
        fuse(nn.Sequential(torch.compile(nn.ReLU())))


def test_no_library_is_imported():
    code = (
        "import sys, torch, regfast; regfast.fuse(torch.nn.Sequential(torch.nn.MaxPool2d(2)));"
        "peers = {'timm', 'torchvision', 'kornia', 'antialiased_cnns', 'composer'};"
        "assert not peers & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=next(iter(regfast.__path__)) + "/.."
    )


# Networks: the number of fused layers.
NETWORKS = {
    ("timm", "resnetblur50"): 4, ("timm", "resnetblur18"): 4,
    ("antialiased_cnns", "resnet18"): 7, ("antialiased_cnns", "alexnet"): 4,
    ("antialiased_cnns", "mobilenet_v2"): 4, ("antialiased_cnns", "densenet121"): 4,
    ("antialiased_cnns", "vgg11"): 5,
}  # fmt: skip


# The VGG has 130 million parameters.
CASES = [
    pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.slow] * ("vgg11" in pair))
    for pair in NETWORKS
]


@pytest.mark.parametrize("library,name", CASES)
def test_networks_are_the_same_function_and_take_their_checkpoints(library, name):
    module = load(library)
    torch.manual_seed(0)
    if library == "timm":
        # Not zero, where a residual branch computes nothing.
        plain = module.create_model(name, num_classes=7, zero_init_last=False).eval()
    else:
        plain = getattr(module, name)(pretrained=False, num_classes=7).eval()
    model = fuse(copy.deepcopy(plain))
    report = antialias_report(model)
    assert sum(row.done.startswith("fused") for row in report) == NETWORKS[library, name], str(
        report
    )
    assert not [row for row in report if row.done == "already blurred"], str(report)
    check_state(model, plain)
    # Alexnet and VGG pool five times.
    x = torch.randn(1, 3, 96, 95)
    expected, found = plain(x), model(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    gradients = [
        torch.autograd.grad(y.sum(), list(m.parameters()))
        for y, m in ((found, model), (expected, plain))
    ]
    for a, b in zip(*gradients, strict=True):
        # Relative to a parameter's largest entry: sums of tens of layers in another order.
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6
    with torch.no_grad():
        assert torch.equal(restore(model)(x), expected)
