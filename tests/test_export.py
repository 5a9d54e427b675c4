"""Exported graphs have only PyTorch's operators: torch.export, torch.jit.trace, ONNX, TensorBoard.

With backend "triton", torch.export records the kernels; other exporters raise an error of one line,
and so does torch.jit.script.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import regfast
from regfast._core.dispatch import HAS_TRITON

LAYERS = [
    regfast.MaxPool2dAA(3, 2, 1),
    regfast.MaxPool2dAA(2, activation="relu"),
    regfast.MaxPool2dAA(3, 2, ceil_mode=True),
    regfast.MaxPool2dAA(2, dilation=2),
    regfast.MaxPool2dAA(2, blur_size=4, padding_mode="reflect"),
    regfast.AvgPool2dAA(2),
    regfast.AvgPool2dAA(3, 2, 1),
    regfast.BlurPool2d(),
    regfast.BlurPool2d(4, activation="relu", padding_mode="replicate"),
    regfast.BlurPool2d(5, padding_mode="zeros"),
    regfast.Conv2dAA(4, 4, 3, 2, 1),
    regfast.ResidualBlock(4, 4, stride=2, antialias=True),
    regfast.BottleneckBlock(4, 2),
    regfast.ReZero(nn.Conv2d(4, 4, 3, padding=1), activation="relu"),
]
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: repr(layer).split("\n")[0][:60])
# float32 convolutions and sums of order one, in another order.
FLOAT32 = dict(rtol=0, atol=1e-5)
SHAPES = [(1, 3, 16, 16), (40, 3, 16, 16), (2, 3, 15, 24)]


def network(layer: nn.Module) -> nn.Module:
    """The layer behind a convolution, so that its input is differentiated."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer).eval()


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return regfast.functional.rezero(x, x, 0.5)


def called(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.fixture
def cuda_image() -> Tensor:
    """An image on CUDA; without a CUDA device it has no memory."""
    if torch.cuda.is_available():
        return torch.randn(2, 3, 8, 8, device="cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(2, 3, 8, 8, device="cuda")


# Without a blur: a build without CUDA can neither index a fake CUDA tensor nor differentiate by it.
ON_CUDA = [(regfast.MaxPool2dAA(3, 1, 1), "max_blur_pool"), (Residual(), "rezero")]


@pytest.mark.skipif(not HAS_TRITON, reason="there are no kernels")
@pytest.mark.parametrize("module,operation", ON_CUDA, ids=["max_blur_pool", "rezero"])
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_torch_export_takes_the_kernels_by_name_alone(strict, module, operation, cuda_image):
    found = {}
    for name in ("auto", "triton"):
        with regfast.backend(name):
            program = torch.export.export(nn.Sequential(module), (cuda_image,), strict=strict)
        found[name] = called(program.graph)
    assert found["auto"] and all(target.startswith("aten.") for target in found["auto"])
    assert f"regfast.{operation}.default" in found["triton"]


@pytest.mark.skipif(not HAS_TRITON, reason="there are no kernels")
@torch.no_grad()
def test_torch_compile_keeps_the_kernels(cuda_image):
    graphs = []

    def record(module, inputs):
        graphs.append(called(module.graph))
        return module

    torch._dynamo.reset()
    fake = getattr(cuda_image, "fake_mode", None)
    with fake if fake is not None else torch.no_grad():
        torch.compile(regfast.MaxPool2dAA(3, 1, 1), backend=record, fullgraph=True)(cuda_image)
    assert any("regfast.max_blur_pool" in target for target in graphs[0])


@layers
@pytest.mark.parametrize("batch", [4, 40])
def test_a_trace_serves_other_batches_and_sizes(layer, batch):
    """The trace is made in grad mode, and differentiates as the layer does."""
    model = network(layer)
    traced = torch.jit.trace(model, torch.randn(batch, 3, 16, 16))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    traced = torch.jit.load(file)
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        y, expected = traced(x), model(x)
        torch.testing.assert_close(y, expected, **FLOAT32)
        grad = torch.randn_like(y)
        gradients = [torch.autograd.grad(output, x, grad)[0] for output in (y, expected)]
        torch.testing.assert_close(*gradients, **FLOAT32)


def test_tensorboard_shows_a_network(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    with tensorboard.SummaryWriter(str(tmp_path)) as board:
        board.add_graph(network(LAYERS[0]), torch.randn(40, 3, 16, 16))
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    graph = events.EventAccumulator(str(tmp_path)).Reload().Graph()
    assert any("max_pool2d" in node.op for node in graph.node)


@layers
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_torchscript_exporter_makes_onnx(layer, dynamic):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, file, x = network(layer), io.BytesIO(), torch.randn(2, 3, 16, 16)
    axes = {name: {0: "n", 2: f"{name}_h", 3: f"{name}_w"} for name in ("x", "y")}
    options = dict(
        dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes if dynamic else None
    )
    torch.onnx.export(model, (x,), file, **options)
    session = runtime.InferenceSession(file.getvalue())
    for shape in SHAPES if dynamic else [x.shape]:
        x = torch.randn(shape)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), **FLOAT32)


BY_NAME = (
    r"backend 'triton' cannot run: torch.jit.trace and ONNX record PyTorch's operators alone; "
    r"take backend 'auto'"
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_record_the_kernels_says_so(device, kernels):
    model, x = network(LAYERS[0]).to(device), torch.randn(2, 3, 8, 8, device=device)
    with pytest.raises(RuntimeError, match=BY_NAME):
        torch.jit.trace(model, x)
    for dynamo in (False, True):
        pytest.importorskip("onnxscript" if dynamo else "onnx")
        with pytest.raises(Exception, match=BY_NAME):
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)
    model(x)


SCRIPTED = [
    *LAYERS,
    regfast.MaxPool1dAA(2),
    regfast.BlurLayer(),
    regfast.ReZeroTransformerEncoderLayer(8, 2),
    regfast.MixUp(),
    regfast.MixupLoss(),
    regfast.MixupCrossEntropyLoss(),
    regfast.MixupBCEWithLogitsLoss(),
    regfast.antialias(nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2))),
]


@pytest.mark.parametrize("module", SCRIPTED, ids=lambda module: type(module).__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_script_is_refused_in_one_line(module):
    for scripted in (module, nn.Sequential(module)):
        with pytest.raises(RuntimeError) as raised:
            torch.jit.script(scripted)
        message = str(raised.value)
        assert "\n" not in message and message.startswith("torch.jit.script cannot compile "), (
            message
        )
        assert message.endswith(": use torch.export.export or torch.jit.trace"), message
