"""`antialias` replaces a model's layers in place, each object kept; `restore` undoes it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peers import load
from torch import nn
from torch.nn import functional as F

import regfast
from regfast import antialias, antialias_report, restore

# float32 sums of some hundreds of products of order one, in another order.
ROUNDING = dict(rtol=1e-4, atol=1e-5)


def stage(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(16, 20, 3, 2, 1, bias=False),
        nn.BatchNorm2d(20),
        activation or nn.ReLU(inplace=True),
    )


class Net(nn.Module):
    """Layers in the order of a forward method, in an nn.Sequential, and two kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv = nn.Conv2d(16, 16, 3, 2, 1, padding_mode="circular")
        self.stage = stage()
        self.point = nn.Conv2d(20, 20, 1, 2)
        self.average = nn.AvgPool2d(2)
        self.same = nn.MaxPool2d(3, 1, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.pool(F.relu(self.stem(x))))
        x = self.same(self.average(self.point(self.stage(x))))
        return self.head(x.mean((2, 3)))


def image(side: int = 96) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


def rows(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {row.name: (row.done, row.why) for row in antialias_report(model)}


def test_every_layer_that_decimates_is_replaced_and_the_report_says_how():
    model = Net()
    assert antialias(model) is model
    assert rows(model) == {
        "stem": ("left", "it has 3 input channels, fewer than min_channels=16"),
        "pool": ("max-blur pool", ""),
        "conv": ("blur after convolution", "no activation follows it in an nn.Sequential"),
        "stage.0": ("blur after activation", "in the place of 2"),
        "point": (
            "blur before convolution",
            "for a pointwise convolution, that is the same function",
        ),
        "average": ("blur and average", ""),
    }
    names = ("pool", "conv", "average", "same")
    types = [type(getattr(model, name)).__name__ for name in names]
    assert types == ["MaxPool2dAA", "Conv2dAA", "AvgPool2dAA", "MaxPool2d"]
    printed = str(antialias_report(model))
    assert "stage.0  Conv2dAA     blur after activation    in the place of 2" in printed
    assert printed.endswith("5 anti-aliased, 1 left")


def test_it_computes_what_the_layers_written_out_do():
    model = Net().eval()
    x = image()
    plain = copy.deepcopy(model)
    antialias(model)
    blur = regfast.BlurPool2d(3, 2)

    def convolved(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        layer.stride = (1, 1)
        return layer(x)

    h = regfast.MaxPool2dAA(3, 2, 1)(F.relu(plain.stem(x)))
    h = blur(convolved(plain.conv, h))
    h = blur(F.relu(plain.stage[1](convolved(plain.stage[0], h))))
    h = blur(convolved(plain.point, h))
    h = plain.head(plain.same(regfast.AvgPool2dAA(2)(h)).mean((2, 3)))
    torch.testing.assert_close(model(x), h, **ROUNDING)


@pytest.mark.parametrize(
    "activation,done",
    [
        (nn.ReLU(), "blur after activation"), (nn.Hardswish(), "blur after activation"),
        (nn.GELU(), "blur after activation"),
        (nn.PReLU(), "blur after convolution"), (nn.Softmax(1), "blur after convolution"),
    ],
    ids=str,
)  # fmt: skip
def test_in_a_sequential_the_blur_comes_after_the_activation(activation, done):
    model, x = stage(activation).eval(), torch.randn(2, 16, 17, 16)
    expected = model[1](F.conv2d(x, model[0].weight, padding=1))
    if done == "blur after activation":
        expected = regfast.BlurPool2d(3, 2)(activation(expected.clone()))
    else:
        expected = activation(
            model[1](regfast.BlurPool2d(3, 2)(F.conv2d(x, model[0].weight, padding=1)))
        )
    keys = list(model.state_dict())
    antialias(model)
    torch.testing.assert_close(model(x), expected, **ROUNDING)
    assert rows(model)["0"][0] == done and list(model.state_dict()) == keys
    if isinstance(activation, nn.PReLU):
        assert rows(model)["0"][1] == "the activation after it, 2, has parameters"


def test_before_the_convolution_at_a_quarter_of_the_arithmetic():
    model, x = stage().eval(), torch.randn(2, 16, 17, 16)
    expected = model(regfast.BlurPool2d(3, 1)(x))
    antialias(model, blur="before")
    torch.testing.assert_close(model(x), expected, **ROUNDING)
    assert rows(model) == {"0": ("blur before convolution", "")} and isinstance(model[2], nn.ReLU)


def test_checkpoints_load_strictly_there_and_back():
    plain, model = Net(), antialias(Net())
    assert list(plain.state_dict()) == list(model.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)


def test_restore_gives_back_the_model_with_the_parameters_that_it_has_now():
    model, x = Net(), image()
    objects, attributes = (
        list(model.modules()),
        [dict(module.__dict__) for module in model.modules()],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    antialias(model)
    model(x).sum().backward()
    optimizer.step()
    weights = copy.deepcopy(model.state_dict())
    assert restore(model) is model
    assert (
        list(model.modules()) == objects
        and [dict(module.__dict__) for module in objects] == attributes
    )
    fresh = Net()
    fresh.load_state_dict(weights, strict=True)
    assert repr(model) == repr(fresh)
    assert torch.equal(model.eval()(x), fresh.eval()(x))


def test_restore_leaves_what_antialias_did_not_make():
    model = nn.Sequential(regfast.MaxPool2dAA(2), nn.MaxPool2d(2), regfast.Conv2dAA(16, 16, 3, 2))
    antialias(model)
    assert rows(model)["0"] == ("already blurred", "it is regfast's own")
    restore(model)
    assert [type(layer) for layer in model] == [regfast.MaxPool2dAA, nn.MaxPool2d, regfast.Conv2dAA]
    assert restore(restore(Net())) is not None


def test_twice_is_once():
    model, x = antialias(Net()).eval(), image()
    y, report, printed = model(x), antialias_report(model), repr(model)
    antialias(model)
    assert torch.equal(model(x), y) and antialias_report(model) == report and repr(model) == printed
    restore(model)
    assert type(model.pool) is nn.MaxPool2d and type(model.stage[2]) is nn.ReLU


def test_restore_leaves_no_trace_of_a_part_that_was_converted_for_itself():
    model = Net()
    antialias(model.stage, conv=False)
    restore(model)
    assert rows(model.stage)["0"][0] == "blur after activation"


def test_restore_refuses_a_convolution_with_its_blur_in_another_layer():
    model = antialias(stage())
    with pytest.raises(
        ValueError, match=r"a Conv2dAA, is in another layer: restore the nn\.Sequential of both"
    ):
        restore(model[0])
    assert type(model[0]) is regfast.Conv2dAA and type(restore(model)[0]) is nn.Conv2d


def test_a_layer_that_has_come_since_is_reported_as_what_it_is():
    model = antialias(nn.Sequential(nn.MaxPool2d(2)))
    model.append(nn.MaxPool2d(2))
    assert rows(model)["1"] == (
        "left",
        "it was added after the conversion: convert the model again",
    )
    assert rows(antialias(model))["1"] == ("max-blur pool", "")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_model_that_is_a_layer_is_converted_itself(rank):
    name, x = f"MaxPool{rank}d", torch.randn(1, 2, *(8,) * rank)
    model = getattr(nn, name)(2)
    assert antialias(model) is model and type(model).__name__ == f"{name}AA"
    # Code that looks for poolings by class finds it.
    assert isinstance(model, getattr(nn, name))
    assert torch.equal(model(x), getattr(regfast, f"{name}AA")(2)(x))
    assert list(rows(model)) == ["(the model)"]
    assert type(restore(model)) is getattr(nn, name)


def test_a_converted_model_copies_pickles_and_saves(tmp_path):
    model, x = antialias(Net()).eval(), image()
    torch.save(model, tmp_path / "model.pt")
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert torch.equal(copied(x), model(x))
        restore(copied)
        assert type(copied.stage[2]) is nn.ReLU and type(copied.conv) is nn.Conv2d


def test_before_it_a_report_says_what_would_be_done():
    model = Net()
    before, printed = antialias_report(model), repr(model)
    assert repr(model) == printed
    after = antialias_report(antialias(model))
    assert [(row.name, row.done, row.why) for row in before] == [
        (row.name, row.done, row.why) for row in after
    ]
    assert str(antialias_report(nn.Linear(2, 2))) == "nothing decimates"


def test_the_convolution_keeps_its_padding_mode_dilation_and_groups():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 2, dilation=2, groups=4, padding_mode="reflect"))
    x = torch.randn(1, 16, 16, 16)
    plain = copy.deepcopy(model)
    antialias(model)
    plain[0].stride = (1, 1)
    torch.testing.assert_close(model(x), regfast.BlurPool2d(3, 2)(plain(x)), **ROUNDING)


def test_dtype_device_and_memory_format_are_kept():
    model = antialias(Net().to(torch.bfloat16).to(memory_format=torch.channels_last))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    meta = antialias(Net().to("meta"))
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_frozen_parameters_stay_frozen_and_are_the_same_objects():
    model = Net()
    model.conv.weight.requires_grad_(False)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    antialias(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not model.conv.weight.requires_grad and model.conv.bias.requires_grad


def test_hooks_are_kept():
    model, called = Net(), []
    for name in ("pool", "conv", "average"):
        getattr(model, name).register_forward_hook(
            lambda module, args, y, name=name: called.append((name, tuple(y.shape[2:])))
        )
    model.conv.weight.register_hook(lambda grad: called.append("gradient"))
    antialias(model)(image()).sum().backward()
    assert called == [("pool", (24, 24)), ("conv", (12, 12)), ("average", (1, 1)), "gradient"]


def test_a_hook_on_an_activation_leaves_it_in_its_place():
    model, seen = stage(nn.ReLU()), []
    model[2].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    antialias(model)(torch.randn(1, 16, 8, 8))
    assert seen == [(1, 20, 4, 4)]
    assert rows(model)["0"] == (
        "blur after convolution",
        "the activation after it, 2, has hooks or a forward of its own",
    )


def test_an_activation_with_a_replaced_forward_stays():
    model = stage(nn.ReLU())
    model[2].forward = lambda x: torch.full_like(x, 7.0)
    assert antialias(model)(torch.randn(1, 16, 8, 8)).unique().tolist() == [7]


class NormConv2d(nn.Conv2d):
    """No normalisation, whatever its name says."""


@pytest.mark.parametrize(
    "between",
    [
        nn.LayerNorm([16, 4, 4]),
        nn.LayerNorm(4),
        nn.RMSNorm([4, 4]),
        NormConv2d(16, 16, 3, 1, 1),
        nn.Dropout(),
    ],
    ids=["LayerNorm of a whole image", "LayerNorm of rows", "RMSNorm", "convolution", "Dropout"],
)
def test_what_may_not_see_a_larger_image_is_given_the_blurred_one(between):
    model, seen = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), between, nn.ReLU()), []
    between.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    antialias(model)(torch.randn(1, 16, 8, 8))
    assert seen == [(1, 16, 4, 4)] and rows(model)["0"][0] == "blur after convolution"


class NormConv(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def test_a_block_with_norm_in_its_name_is_no_normalisation():
    model, x = (
        nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), NormConv(), nn.ReLU()),
        torch.randn(1, 16, 33, 32),
    )
    assert model(x).shape == (1, 32, 15, 14)
    assert antialias(model)(x).shape == (1, 32, 15, 14)
    assert rows(model)["0"][0] == "blur after convolution"


def timm_layer(name: str) -> type[nn.Module]:
    return getattr(load("timm.layers"), name)


def torchvision_layer(name: str) -> type[nn.Module]:
    return getattr(load("torchvision.ops.misc"), name)


@pytest.mark.parametrize(
    "block",
    [
        lambda: torchvision_layer("Conv2dNormActivation")(16, 16, 3, padding=0),
        lambda: timm_layer("ConvNormAct")(16, 16, 3, padding=0),
        lambda: regfast.ConvNormActAA(16, 16, 3, 1, 0),
        lambda: regfast.ResidualBlock(16, 16, norm_layer=nn.BatchNorm2d),
    ],
    ids=[
        "torchvision's Conv2dNormActivation",
        "timm's ConvNormAct",
        "ConvNormActAA",
        "ResidualBlock",
    ],
)
def test_blocks_are_no_normalisations(block):
    model, x = (
        nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), block(), nn.ReLU()).eval(),
        torch.randn(1, 16, 17, 16),
    )
    shape = model(x).shape
    assert antialias(model)(x).shape == shape and rows(model)["0"][0] == "blur after convolution"


class Scaled(nn.Module):
    is_normalisation = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.std() + 1)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(16), lambda: nn.GroupNorm(4, 16), lambda: nn.InstanceNorm2d(16),
        lambda: nn.LocalResponseNorm(2),
        lambda: nn.SyncBatchNorm(16), lambda: torchvision_layer("FrozenBatchNorm2d")(16),
        lambda: timm_layer("LayerNorm2d")(16), lambda: timm_layer("GroupNorm1")(16),
        lambda: timm_layer("FrozenBatchNormAct2d")(16, apply_act=False), Scaled,
    ],
)  # fmt: skip
def test_normalisations_of_libraries_and_those_that_say_so(norm):
    model, x = (
        nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), norm(), nn.ReLU()).eval(),
        torch.randn(1, 16, 17, 16),
    )
    expected = regfast.BlurPool2d(3, 2)(
        model[1](F.conv2d(x, model[0].weight, model[0].bias, padding=1)).relu()
    )
    assert rows(antialias(model))["0"] == ("blur after activation", "in the place of 2")
    torch.testing.assert_close(model(x), expected, **ROUNDING)


@pytest.mark.parametrize(
    "name", ["BatchNormAct2d", "GroupNormAct", "LayerNormAct2d", "FrozenBatchNormAct2d"]
)
def test_timm_s_norm_act_layers_blur_after_their_own_activation(name):
    arguments = (16, 4) if name == "GroupNormAct" else (16,)
    layer = timm_layer(name)(*arguments, act_layer=nn.SiLU)
    model, x = (
        nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, bias=False), layer).eval(),
        torch.randn(1, 16, 17, 16),
    )
    plain = copy.deepcopy(model)
    expected = regfast.BlurPool2d(3, 2)(model[1](F.conv2d(x, model[0].weight, padding=1)))
    antialias(model)
    assert rows(model)["0"] == ("blur after activation", "in the place of 1.act")
    torch.testing.assert_close(model(x), expected, **ROUNDING)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(restore(model)) == repr(plain)


@pytest.mark.parametrize("mode", [None, "zeros"])
def test_the_blur_of_all_layers_is_chosen(mode):
    model, plain, x = Net().eval(), Net().eval(), image(97)
    plain.load_state_dict(model.state_dict())
    antialias(model, blur_size=5, filter="hann", padding_mode=mode)
    border = mode or "reflect"
    blur = regfast.BlurPool2d(5, 2, filter="hann", padding_mode=border)

    def convolved(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        layer.stride = (1, 1)
        return layer(x)

    own = dict(blur_size=5, filter="hann")
    h = regfast.MaxPool2dAA(3, 2, 1, **own, padding_mode=mode or "partial")(F.relu(plain.stem(x)))
    h = blur(convolved(plain.conv, h))
    h = blur(F.relu(plain.stage[1](convolved(plain.stage[0], h))))
    h = blur(convolved(plain.point, h))
    h = plain.head(regfast.AvgPool2dAA(2, **own, padding_mode=border)(h).mean((2, 3)))
    plain.same = nn.Identity()
    model.same = nn.Identity()
    torch.testing.assert_close(model(x), h, **ROUNDING)
    chosen = "blur_size=5, filter='hann'" + (", padding_mode='zeros'" if mode else "")
    assert rows(model)["stage.0"] == ("blur after activation", f"in the place of 2; {chosen}")
    assert rows(model)["pool"] == ("max-blur pool", chosen)
    assert "filter='hann'" in repr(model.pool) and "blur_filter='hann'" in repr(model.conv)


def test_taps_may_be_numbers():
    x, taps = torch.randn(1, 16, 9, 8), [0.1, 0.8, 0.1]
    for given in (taps, torch.tensor(taps, dtype=torch.float64)):
        model = antialias(nn.Sequential(nn.MaxPool2d(2)), filter=given)
        torch.testing.assert_close(model(x), regfast.MaxPool2dAA(2, filter=taps)(x))
    assert rows(model)["0"][1] == "filter=(0.1, 0.8, 0.1)"


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()], ids=str)
def test_a_stride_set_later_is_obeyed_where_the_blur_is_behind_the_activation(activation):
    model, x = (
        antialias(nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), activation)),
        torch.randn(1, 16, 8, 8),
    )
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), copy.deepcopy(activation))
    plain.load_state_dict(model.state_dict())
    assert model(x).shape == (1, 16, 4, 4)
    for converted in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        converted[0].stride = (1, 1)
        assert converted(x).shape == (1, 16, 8, 8)
        torch.testing.assert_close(converted(x), plain(x), **ROUNDING)
        converted[0].stride = 4
        blurred = regfast.BlurPool2d(6, 4)(plain(x))
        torch.testing.assert_close(converted(x), blurred, **ROUNDING)
        converted[0].blur_filter = "hann"
        torch.testing.assert_close(
            converted(x), regfast.BlurPool2d(6, 4, filter="hann")(plain(x)), **ROUNDING
        )
    restore(model)
    assert (
        model[0].stride == 4
        and "_regfast_follower" not in model[0].__dict__
        and type(model[1]) is type(activation)
    )


def stand_in(module: str, name: str) -> nn.Module:
    return type(name, (nn.AvgPool2d,), {"__module__": module, "__qualname__": name})(3, 1, 1)


@pytest.mark.parametrize(
    "layers,expected",
    [
        (lambda blur: [nn.Conv2d(16, 16, 3, 2), blur], ("0", "by 1, a blur after it")),
        (lambda blur: [nn.MaxPool2d(2), blur], ("0", "by 1, a blur after it")),
        (
            lambda blur: [nn.Conv2d(16, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), blur],
            ("0", "by 3, a blur after it"),
        ),
        (lambda blur: [blur, nn.Conv2d(16, 16, 3, 2)], ("1", "by 0, a blur before it")),
    ],
)
@pytest.mark.parametrize(
    "blur",
    [
        regfast.BlurPool2d(3, 1),
        stand_in("timm.layers.blur_pool", "BlurPool2d"),
        stand_in("kornia.filters.blur_pool", "BlurPool2D"),
    ],
    ids=["regfast", "timm", "kornia"],
)
def test_nothing_is_blurred_twice(layers, expected, blur):
    model = nn.Sequential(*layers(blur))
    kinds = [type(layer) for layer in model]
    antialias(model)
    assert [type(layer) for layer in model] == kinds
    assert rows(model)[expected[0]] == ("already blurred", expected[1])


def test_what_else_decimates_is_reported_with_a_reason():
    model = nn.Sequential(
        nn.LPPool2d(2, 2), nn.LPPool1d(2, 3, 1), nn.FractionalMaxPool2d(2, 3),
        nn.AdaptiveAvgPool2d(7),
        nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d((None, 1)), nn.PixelUnshuffle(2),
        nn.Conv2d(3, 32, 2, 2), nn.Conv2d(32, 32, 8, 8), nn.Conv2d(32, 32, 2, 2),
    )  # fmt: skip
    assert {
        name: why for name, (done, why) in rows(antialias(model)).items() if done == "left"
    } == {
        "0": "there is no anti-aliased LPPool2d",
        "2": "its windows are drawn at random, at no one stride",
        "3": "its stride depends on the image's size",
        "6": "it moves pixels into channels and drops none",
        "7": "it embeds patches of 2 x 2 that do not overlap",
        "8": "it embeds patches of 8 x 8 that do not overlap",
    }
    assert rows(model)["9"][0] == "blur after convolution"


def test_a_sequential_with_a_replaced_forward_has_its_own_order():
    model = stage()
    model.forward = lambda x: model[0](x)
    assert antialias(model)(torch.randn(1, 16, 8, 8)).shape == (1, 20, 4, 4)


def test_an_activation_to_skip_stays_in_its_place():
    model = stage(nn.ReLU())
    antialias(model, skip=nn.ReLU)
    assert type(model[2]) is nn.ReLU
    assert rows(model)["0"] == (
        "blur after convolution",
        "the activation after it, 2, is in `skip`",
    )


def test_restore_refuses_what_has_become_something_else_since_and_changes_nothing():
    model = antialias(Net())
    nn.utils.parametrizations.weight_norm(model.conv)
    printed = repr(model)
    with pytest.raises(
        ValueError, match=r"model\.conv is now a ParametrizedConv2dAA, not a Conv2dAA"
    ):
        restore(model)
    assert repr(model) == printed
    nn.utils.parametrize.remove_parametrizations(model.conv, "weight")
    assert type(restore(model).conv) is nn.Conv2d


def test_a_pool_of_stride_one_stays_as_it_is():
    model = antialias(
        nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(16, 16, 3), nn.AvgPool2d(3, 1))
    )
    assert [type(layer) for layer in model] == [
        nn.MaxPool2d,
        nn.Conv2d,
        nn.AvgPool2d,
    ] and not antialias_report(model)


def test_a_pool_that_returns_indices_stays_as_it_is():
    model = antialias(nn.Sequential(nn.MaxPool2d(2, return_indices=True)))
    assert type(model[0]) is nn.MaxPool2d and "indices" in rows(model)["0"][1]


def test_shared_modules_stay_shared_and_are_converted_once():
    pool, conv, relu = nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(conv, relu, pool),
            "b": nn.Sequential(conv, relu),
            "c": pool,
            "d": nn.Sequential(relu),
        }
    )
    antialias(model)
    assert model["a"][0] is model["b"][0] is conv and model["a"][2] is model["c"] is pool
    assert rows(model) == {
        "a.0": ("blur after convolution", "it is used in several places"),
        "a.2": ("max-blur pool", ""),
    }
    assert model["d"][0] is relu
    x = torch.randn(1, 16, 16, 16)
    assert model["a"](x).shape == (1, 16, 4, 4) and model["b"](x).shape == (1, 16, 8, 8)


def test_a_shared_activation_is_replaced_in_one_place_alone():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), relu, nn.Conv2d(16, 16, 3, 1, 1), relu)
    antialias(model)
    assert isinstance(model[1], regfast.BlurPool2d) and model[3] is relu
    restore(model)
    assert model[1] is model[3] is relu


def test_lazy_subclassed_parametrised_and_patched_layers_are_left_and_reported():
    class Padded(nn.Conv2d):
        pass

    patched = nn.MaxPool2d(2)
    patched.forward = lambda x: x
    model = nn.Sequential(
        nn.LazyConv2d(16, 3, 2), Padded(16, 16, 3, 2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, 2)), patched,
        nn.Conv3d(16, 16, 3, 2), nn.MaxPool2d(2, padding=2), nn.ConvTranspose2d(16, 16, 3, 2),
    )  # fmt: skip
    types = [type(layer) for layer in model]
    antialias(model)
    assert [type(layer) for layer in model] == types
    words = ["lazy", "subclass", "parametrised", "replaced", "nn.Conv3d", "at most half"]
    assert [row.done for row in antialias_report(model)] == ["left"] * 6
    assert all(word in row.why for word, row in zip(words, antialias_report(model)))


def test_old_weight_norm_is_a_hook_and_stays():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(16, 16, 3, 2)))
    keys = list(model.state_dict())
    antialias(model)(torch.randn(1, 16, 9, 9)).sum().backward()
    assert list(model.state_dict()) == keys and model[0].weight_g.grad is not None


def test_attributes_that_a_layer_has_of_its_own_are_kept():
    """Pruning tools keep a `ratio` on each layer, for example."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, 2), nn.MaxPool2d(2))
    model[0].activation, model[1].ratio = nn.ReLU(), 0.5
    antialias(model)
    assert rows(model) == {
        "0": ("left", "it has an attribute 'activation' of its own"),
        "1": ("left", "it has an attribute 'ratio' of its own"),
    }
    assert isinstance(model[0].activation, nn.ReLU) and model[1].ratio == 0.5


def test_complex_numbers_are_left():
    model = antialias(nn.Sequential(nn.Conv2d(16, 16, 3, 2, dtype=torch.complex64)))
    assert type(model[0]) is nn.Conv2d and "torch.complex64" in rows(model)["0"][1]


def test_a_pool_without_a_stride_has_its_kernel_s():
    model = nn.Sequential(nn.MaxPool2d(2))
    model[0].stride = None
    assert torch.equal(antialias(model)(x := image()), regfast.MaxPool2dAA(2)(x))


class Functional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 2)


class Deeper(nn.Module):
    """As torchvision's Inception, which calls the layer in a method; here in a nested function."""

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return (lambda y: F.avg_pool2d(y, 2))(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pooled(x)


def test_functional_calls_are_left_and_reported():
    model = antialias(nn.Sequential(Functional(), nn.MaxPool2d(2), Deeper()))
    assert rows(model) == {
        "0": ("left", "its forward calls max_pool2d, which is no layer"),
        "1": ("max-blur pool", ""),
        "2": ("left", "its forward calls avg_pool2d, which is no layer"),
    }


def test_options_choose_the_layers():
    def left(**options) -> set[str]:
        return {
            row.name for row in antialias_report(antialias(Net(), **options)) if row.done == "left"
        }

    assert left(max_pool=False) == {"stem", "pool"}
    assert left(conv=False) == {"stem", "conv", "stage.0", "point"}
    assert left(avg_pool=False) == {"stem", "average"}
    assert left(min_channels=0) == set()
    assert (
        left(skip="stage") == left(skip=["stage.0"]) == left(skip=["st*.0"]) == {"stem", "stage.0"}
    )
    assert left(skip=[nn.MaxPool2d, "p*nt"]) == {"stem", "pool", "point"}
    assert (
        rows(antialias(nn.ModuleDict({"a[0]": nn.MaxPool2d(2)}), skip="a[0]"))["a[0]"][0] == "left"
    )
    assert left(skip=nn.Sequential) == {"stem", "stage.0"}
    assert "in `skip`" in rows(antialias(Net(), skip="pool"))["pool"][1]


@pytest.mark.parametrize(
    "make,options,error,words",
    [
        (lambda: [Net()], {}, TypeError, ["model", "list"]),
        (Net, dict(blur="behind"), ValueError, ["blur", "'behind'", "'after'", "'before'"]),
        (Net, dict(conv=1), TypeError, ["conv", "1", "True or False"]),
        (Net, dict(min_channels=-1), ValueError, ["min_channels", "-1", "at least 0"]),
        (Net, dict(skip="steam"), ValueError, ["skip", "'steam'"]),
        (Net, dict(skip=[3]), TypeError, ["skip", "3", "names"]),
        (Net, dict(skip=None), TypeError, ["skip", "None", "names"]),
        (Net, dict(skip=nn.LSTM), ValueError, ["skip", "LSTM"]),
        (Net, dict(blur_size=0), ValueError, ["blur_size", "0", "at least 1"]),
        (Net, dict(blur_size=(3, 3)), ValueError, ["blur_size", "(3, 3)", "one integer"]),
        (Net, dict(filter="sinc7"), ValueError, ["filter", "'sinc7'", "binomial"]),
        (Net, dict(filter=[1.0, 1.0], blur_size=3), ValueError, ["2 taps", "3"]),
        (Net, dict(padding_mode="partial"), ValueError, ["padding_mode", "'partial'", "'reflect'"]),
        (
            lambda: nn.Sequential(torch.compile(Net())),
            {},
            ValueError,
            ["model.0", "OptimizedModule", "before torch.compile"],
        ),
        (lambda: nn.DataParallel(Net()), {}, ValueError, ["DataParallel", "before it is wrapped"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_refused_and_the_model_is_untouched(make, options, error, words):
    model = make()
    before = repr(model)
    with pytest.raises(error) as raised:
        antialias(model, **options)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert repr(model) == before


def test_a_model_compiled_in_place_or_scripted_is_refused():
    model = Net()
    model.compile()
    with pytest.raises(ValueError, match=r"compiled.*before torch\.compile"):
        antialias(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.MaxPool2d(2)))
    with pytest.raises(ValueError, match="scripted"):
        antialias(scripted)


@pytest.mark.slow
def test_a_model_under_distributed_data_parallel_is_refused(tmp_path):
    from torch.distributed._composable.replicate import replicate

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(
            ValueError, match="DistributedDataParallel: convert a model before it is wrapped"
        ):
            antialias(model)
        with pytest.raises(ValueError, match="DDPNet: convert a model before it is wrapped"):
            antialias(replicate(Net()))
        wrapped = nn.parallel.DistributedDataParallel(antialias(Net()))
        wrapped(image()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
