"""Anti-aliased torchvision and timm networks run, train, compile, export and load checkpoints.

Images have 64 pixels, so that every network still has something to pool. Variants are small.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peers import load
from torch import nn

import regfast

# float32 sums of a whole network in another order, relative to its largest logit.
ROUNDING = 1e-3

# The number of anti-aliased layers, and how many of them blur after an activation.
TORCHVISION = {
    "resnet18": (7, 0), "resnet50": (7, 0), "vgg11_bn": (5, 0), "mobilenet_v2": (4, 4),
    "mobilenet_v3_small": (4, 4),
    "densenet121": (4, 0), "regnet_y_400mf": (8, 4), "convnext_tiny": (3, 0),
}  # fmt: skip
TIMM = {
    "resnet18": (7, 0),
    "resnet50d": (7, 0),
    "convnext_atto": (3, 0),
    "regnety_002": (8, 0),
    "mobilenetv3_small_050": (4, 0),
}
ARCHITECTURES = [("torchvision", name, *counts) for name, counts in TORCHVISION.items()]
ARCHITECTURES += [("timm", name, *counts) for name, counts in TIMM.items()]
NAMES = [row[:2] for row in ARCHITECTURES]
everyone = pytest.mark.parametrize("library,name", NAMES, ids=["-".join(pair) for pair in NAMES])


def make(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        return load("timm").create_model(name, num_classes=7)
    return getattr(load("torchvision.models"), name)(num_classes=7)


def check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize(
    "library,name,converted,after",
    ARCHITECTURES,
    ids=[f"{row[0]}-{row[1]}" for row in ARCHITECTURES],
)
def test_networks_are_converted_train_and_come_back(library, name, converted, after):
    """Forward, a training step, a strict checkpoint round trip; `restore` gives the same bits."""
    model, x = make(library, name).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        aliased = model(x)
    checkpoint = copy.deepcopy(model.state_dict())
    report = regfast.antialias_report(regfast.antialias(model))
    done = [row.done for row in report]
    assert (len(done) - done.count("left"), done.count("blur after activation")) == (
        converted,
        after,
    ), str(report)
    # The first convolution, which reads the image, and VGG's last pooling.
    reasons = ("3 input channels", "embeds patches of 4 x 4", "depends on the image's size")
    assert all(
        any(reason in row.why for reason in reasons) for row in report if row.done == "left"
    ), str(report)
    y = model(x)
    assert y.shape == (2, 7) and y.isfinite().all() and not torch.equal(y, aliased)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.load_state_dict(checkpoint, strict=True)
    plain = make(library, name).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    regfast.restore(model)
    assert repr(model) == repr(plain)
    with torch.no_grad():
        assert torch.equal(model(x), aliased)


# The last stages.
DILATED = {
    "mobilenet_v2": [f"features.{at}" for at in range(7, 18)],
    "regnet_y_400mf": ["trunk_output.block3", "trunk_output.block4"],
    "resnet18": ["layer3", "layer4"], "convnext_tiny": ["features.4", "features.5"],
}  # fmt: skip


@pytest.mark.parametrize("name", DILATED)
def test_segmentation_libraries_dilate_a_converted_encoder(name):
    """As segmentation_models_pytorch does: in the last stages, dilations replace strides."""

    def dilated(model: nn.Module) -> dict[str, torch.Size]:
        sizes = {}
        for stage in map(model.get_submodule, DILATED[name]):
            for module in stage.modules():
                if isinstance(module, nn.Conv2d):
                    rows, columns = module.kernel_size
                    module.stride, module.dilation = (1, 1), (2, 2)
                    module.padding = (rows // 2 * 2, columns // 2 * 2)
        for stage in DILATED[name]:
            module = model.get_submodule(stage)
            module.register_forward_hook(
                lambda module, args, y, stage=stage: sizes.update({stage: y.shape})
            )
        with torch.no_grad():
            model(torch.randn(1, 3, 96, 96))
        return sizes

    plain, model = (
        make("torchvision", name).eval(),
        regfast.antialias(make("torchvision", name).eval()),
    )
    expected = dilated(plain)
    assert list(expected) == DILATED[name] and dilated(model) == expected


def test_ssd_finds_the_poolings_of_a_converted_vgg():
    """SSD300 finds nn.MaxPool2d, sets the third's ceil_mode, and cuts the network at the fourth."""
    vgg, ssd = load("torchvision.models.vgg"), load("torchvision.models.detection.ssd")
    with torch.device("meta"):
        features = regfast.antialias(vgg.make_layers(vgg.cfgs["D"]))
        extractor = ssd.SSDFeatureExtractorVGG(features, highres=False)
        maps = extractor(torch.empty(1, 3, 300, 300))
    pools = [module for module in extractor.modules() if isinstance(module, regfast.MaxPool2dAA)]
    assert [pool.ceil_mode for pool in pools] == [False, False, True, False]
    assert [tuple(value.shape[2:]) for value in maps.values()] == [
        (n, n) for n in (38, 19, 10, 5, 3, 1)
    ]


@pytest.mark.parametrize(
    "library,name",
    [("torchvision", "vit_b_16"), ("torchvision", "swin_t"), ("timm", "vit_tiny_patch16_224")],
)
def test_patches_are_left_and_reported(library, name):
    module = load("timm" if library == "timm" else "torchvision.models")
    with torch.device("meta"):
        model = module.create_model(name) if library == "timm" else getattr(module, name)()
    reasons = {
        row.why for row in regfast.antialias_report(regfast.antialias(model, min_channels=0))
    }
    size = 4 if name == "swin_t" else 16
    assert f"it embeds patches of {size} x {size} that do not overlap" in reasons
    assert ("it moves pixels into channels and drops none" in reasons) == (name == "swin_t")
    assert len(reasons) == 1 + (name == "swin_t")


@everyone
def test_converted_networks_are_traced_by_fx(library, name):
    model, x = regfast.antialias(make(library, name)).eval(), torch.randn(2, 3, 64, 64)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
    calls = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {"max_blur_pool", "blur_pool"} & {getattr(call, "__name__", "") for call in calls}


@pytest.mark.slow
@everyone
def test_converted_networks_compile_without_a_graph_break(library, name):
    torch._dynamo.reset()
    model, x = regfast.antialias(make(library, name)).eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    check_same(y, expected)
    for found, wanted in zip(torch.autograd.grad(y.sum(), list(model.parameters())), gradients):
        assert (found - wanted).abs().max() <= ROUNDING * wanted.abs().max() + 1e-6


@pytest.mark.slow
@everyone
def test_converted_networks_are_exported(library, name):
    """The batch size is dynamic, and the graph has only PyTorch's own operators."""
    model, x = regfast.antialias(make(library, name)).eval(), torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not [node for node in exported.graph.nodes if "regfast" in str(node.target)]
    more = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        for images in (x, more):
            check_same(exported.module()(images), model(images))


@pytest.mark.slow
@everyone
def test_converted_networks_run_in_onnxruntime(library, name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = regfast.antialias(make(library, name)).eval(), torch.randn(2, 3, 64, 64)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        check_same(torch.from_numpy(found), model(x))


def test_the_layers_of_this_library_run_in_onnxruntime(tmp_path):
    """Every kind of layer in one small network, fast enough for the core tests."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(
        regfast.Conv2dAA(3, 4, 3, 2, 1, activation="relu"),
        regfast.Conv2dAA(4, 8, 3, 2, blur="before"),
        regfast.ConvNormActAA(8, 8, stride=1),
        regfast.ResidualBlock(8, 12, stride=2, antialias=True),
        regfast.MaxPool2dAA(2, activation="relu"), regfast.AvgPool2dAA(2), nn.Flatten(),
        regfast.ResidualLinear(12, 12),
    ).eval()  # fmt: skip
    x, path = torch.randn(2, 3, 71, 69), tmp_path / "model.onnx"
    for gate in (model[3].alpha, model[7].alpha):
        gate.data.fill_(0.5)
    with torch.no_grad():
        expected = model[:6](x).mean((2, 3))
    model = nn.Sequential(*model[:6], nn.AdaptiveAvgPool2d(1), *model[6:]).eval()
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        check_same(torch.from_numpy(found), model[-1](expected))


@pytest.mark.parametrize("name", ["resnet50", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_timm_s_own_blur_is_the_same_function(name):
    """`aa_layer=regfast.BlurPool2d` gives timm's outputs and gradients with timm's weights."""
    timm = load("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name, aa_layer=timm.layers.BlurPool2d, num_classes=7).eval()
    ours = timm.create_model(name, aa_layer=regfast.BlurPool2d, num_classes=7).eval()
    assert sum(isinstance(module, regfast.BlurPool2d) for module in ours.modules()) == 4
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    found, expected = ours(x), theirs(x)
    check_same(found, expected)
    gradients = [
        torch.autograd.grad(y.sum(), list(model.parameters()))
        for y, model in ((found, ours), (expected, theirs))
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= ROUNDING * b.abs().max() + 1e-6
