"""Eager calls bypass the dispatcher; anything that watches PyTorch's operators sees one."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from samples import OPERATIONS, Operation
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import regfast
from regfast._core.dispatch import is_its_memory

every = pytest.mark.parametrize("operation", OPERATIONS, ids=str)


class Log(TorchDispatchMode):
    """The names of the regfast operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "regfast":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def call(operation: Operation, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An output, and the gradient of x."""
    x = x.detach().requires_grad_()
    y = operation.function(x, **operation.arguments(operation.group("main")[0], x.device))
    return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]


@every
def test_a_mode_sees_the_operators(operation, device, kernels):
    x = operation.group("main")[0].input(device=device)
    expected = call(operation, x)
    with Log() as log:
        found = call(operation, x)
    assert log.seen == [f"regfast::{operation}", f"regfast::{operation}_backward"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every
def test_an_eager_call_is_not_dispatched(operation, device, kernels):
    """It saves a small network's time; a profile names the autograd Function instead."""
    x = operation.group("main")[0].input(device=device)
    with torch.profiler.profile() as profile:
        call(operation, x)
    names = {event.key for event in profile.key_averages()}
    assert not any(name.startswith("regfast::") for name in names)
    function = "_" + operation.name.replace("_", "")
    assert {function, f"{function}backward"} <= {name.lower() for name in names}


@every
def test_flops_are_counted_past_the_operators(operation, device, kernels):
    x = operation.group("main")[0].input(device=device)
    with FlopCounterMode(display=False) as counter:
        call(operation, x)
        torch.ones(2, 3, device=device) @ torch.ones(3, 4, device=device)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4


def test_a_subclass_is_given_the_operator(device, kernels):
    """A subclass without memory of its own, which computes with two tensors."""
    a, b = (torch.randn(1, 2, 8, 8, device=device) for _ in range(2))
    pool = regfast.MaxPool2dAA(2)
    y = pool(TwoTensor(a, b))
    assert type(y) is TwoTensor and torch.equal(y.a, pool(a)) and torch.equal(y.b, pool(b))


def escaped_from_a_transform(x: torch.Tensor) -> torch.Tensor:
    """2*x, wrapped by torch.func.grad. Only PyTorch's dispatcher finds its memory."""
    kept = []

    def double(x):
        kept.append(2 * x)
        return kept[0].sum()

    torch.func.grad(double)(x)
    assert is_its_memory(x) and not is_its_memory(kept[0])
    return kept[0]


@every
def test_what_has_escaped_from_a_transform_is_taken(operation, device, kernels):
    sample = operation.group("main")[0]
    x, arguments = sample.input(device=device), operation.arguments(sample, torch.device(device))
    y = operation.function(escaped_from_a_transform(x), **arguments)
    torch.testing.assert_close(y, operation.function(2 * x, **arguments))


def test_what_has_escaped_from_a_transform_is_taken_beside_a_leaf(device, kernels):
    x, f = torch.randn(2, 3, 5, device=device)
    f.requires_grad_()
    for stream in (escaped_from_a_transform(x), 2 * x):
        y = regfast.functional.rezero(stream, f, 0.5, "silu")
        torch.testing.assert_close(y, 2 * x + 0.5 * torch.nn.functional.silu(f))
        (df,) = torch.autograd.grad(y.sum(), f)
        (expected,) = torch.autograd.grad(0.5 * torch.nn.functional.silu(f).sum(), f)
        torch.testing.assert_close(df, expected)


@every
def test_gradients_of_a_batch_of_gradients(operation, device, kernels):
    """torch.autograd's own vmap has tensors without memory that are no subclass."""
    sample = operation.group("main")[0]
    x, arguments = sample.input(device=device), operation.arguments(sample, torch.device(device))
    x = x[:, :, :4, :4] if x.ndim == 4 and "box" not in arguments else x
    found = torch.autograd.functional.jacobian(
        lambda x: operation.function(x, **arguments), x, vectorize=True
    )
    with regfast.backend("reference"):
        expected = torch.autograd.functional.jacobian(
            lambda x: operation.function(x, **arguments), x
        )
    torch.testing.assert_close(found, expected)


@every
def test_a_tensor_that_is_not_what_its_memory_says(operation, device, kernels):
    """The imaginary part of a conjugate only has a sign bit."""
    sample = operation.group("main")[0]
    arguments = operation.arguments(sample, torch.device(device))
    x = torch.randn(sample.shape, dtype=torch.cfloat, device=device).conj().imag
    assert x.is_neg()
    found, expected = (t.detach().requires_grad_() for t in (x, x.clone()))
    y, wanted = (operation.function(t, **arguments) for t in (found, expected))
    torch.testing.assert_close(y, wanted)
    grad = torch.randn(y.shape, dtype=torch.cfloat, device=device).conj().imag
    for g in (grad, grad.clone()):
        (dx,) = torch.autograd.grad(y, found, g, retain_graph=True)
        torch.testing.assert_close(
            dx, torch.autograd.grad(wanted, expected, grad.clone(), retain_graph=True)[0]
        )


@pytest.mark.parametrize("form", ["gate", "post"])
def test_a_graph_of_the_gradient_counts_each_way_once(form, device, kernels):
    """The branch depends on the stream, and one gate serves two residuals."""
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    alpha = torch.tensor([0.7], dtype=torch.float64, device=device, requires_grad=True)

    def blocks(function):
        y = function(x, x.sin(), alpha, "gelu", form)
        return function(y, y.cos(), alpha, "silu", form).sum()

    def written_out(x, f, alpha, activation, form):
        act = getattr(torch.nn.functional, activation)
        return x + alpha * act(f) if form == "gate" else act(x + alpha * f)

    found = torch.autograd.grad(blocks(regfast.functional.rezero), (x, alpha), create_graph=True)
    expected = torch.autograd.grad(blocks(written_out), (x, alpha), create_graph=True)
    torch.testing.assert_close(found, expected)
    second = [
        torch.autograd.grad(sum(g.sum() for g in first), (x, alpha)) for first in (found, expected)
    ]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("name", ["mixup", "mixup_cross_entropy", "rezero"])
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_a_number_that_changes_compiles_no_graph_each(name, path, device, kernels):
    x, index, labels = (
        torch.randn(4, 5, device=device),
        torch.tensor([1, 0, 3, 2], device=device),
        torch.arange(4, device=device),
    )
    calls = {
        "mixup": lambda lam: regfast.functional.mixup(x, index, lam),
        "mixup_cross_entropy": lambda lam: regfast.functional.mixup_cross_entropy(
            x, (labels, labels.flip(0), lam)
        ),
        "rezero": lambda lam: regfast.functional.rezero(x, x, lam),
    }
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(calls[name], backend=counter, fullgraph=True)
    regfast.functional.blur_pool1d(x)
    with regfast.backend(path):
        for lam in (0.1, 0.3, 0.5, 0.6, 0.7, 0.9):
            torch.testing.assert_close(compiled(lam), calls[name](lam))
    # One of the first number, one of all others.
    assert counter.frame_count <= 2


def test_samples_without_elements(device, kernels):
    index = torch.tensor([1, 0], device=device)
    for shape in ((2, 3, 4, 0), (2, 0), (2, 3, 0, 4), (0, 3, 4, 4)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        for options in (
            {},
            {"mean": 0.1, "std": 1.0},
            {"memory_format": torch.channels_last} if len(shape) == 4 else {},
        ):
            y = regfast.functional.mixup(x, index[: shape[0]], 0.3, **options)
            assert y.shape == shape and torch.autograd.grad(y.sum(), x)[0].shape == shape
    regfast.functional.blur_pool1d(torch.zeros(1, 1, 8, device=device))


@every
def test_a_backward_builds_a_graph_where_it_is_differentiated_alone(operation, device, kernels):
    """The backward is then the reference's: it launches no kernel."""
    x = operation.group("main")[0].input(torch.float64, device).requires_grad_()
    y = operation.function(x, **operation.arguments(operation.group("main")[0], x.device))
    grad = torch.randn_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    assert not dx.requires_grad
    launched = len(kernels)
    (again,) = torch.autograd.grad(y, x, grad, create_graph=True)
    assert again.requires_grad and len(kernels) == launched
    torch.testing.assert_close(again.detach(), dx)


@every
def test_forward_mode_is_the_references(operation, device, kernels):
    x = operation.group("main")[0].input(torch.float64, device)
    call(operation, x)
    launched = len(kernels)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        operation.function(dual, **operation.arguments(operation.group("main")[0], x.device))
    assert len(kernels) == launched


def test_what_is_public_is_listed():
    assert sorted(dir(regfast)) == sorted([*regfast.__all__, "__version__"])
    functions = set(regfast.functional.__all__)
    assert not functions & {
        name for name, module in vars(regfast).items() if type(module) is type(pytest)
    }
