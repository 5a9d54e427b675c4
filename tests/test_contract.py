"""The contract of every operation in samples.py.

1. The reference is what SciPy and NumPy compute, in float64.
2. A kernel gives the reference's forward, backward and tangent, ties, NaN and infinities included;
   in bfloat16 to one unit in the last place. It writes every element, and the same bits each time.
   (In a pooling's window that holds a NaN, any element may take the gradient.)
3. Inputs and gradients may have any strides; the output has the input's memory format.
4. Both paths are differentiable twice and forward-mode, and traceable: opcheck, torch.compile
   without a graph break.

A test of a kernel fails if no kernel was launched.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import (
    OPERATIONS,
    Operation,
    Sample,
    as_format,
    blur_window,
    check_gradient_of_nan,
    no_synchronisation,
    pool,
    pool_window,
)
from torch import Tensor

import regfast
from regfast._core.geometry import output_size
from regfast.functional import mixup

# Sums of at most a few hundred products in another order: some units in the last place of float32,
# float64.
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
FLOAT64 = dict(rtol=1e-12, atol=1e-12)
# One rounding to the dtype, after float32 sums on both sides. The interpreter truncates to
# bfloat16, hence a whole unit.
UNIT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def pairs(group: str, slow_ranks: tuple[int, ...] = ()):
    """Every operation with each sample of a group ("": samples without a group).

    Samples of `slow_ranks` run only in the slow suite.
    """
    return pytest.mark.parametrize(
        "operation,sample",
        [
            pytest.param(
                operation,
                sample,
                id=f"{operation}-{sample}",
                marks=pytest.mark.slow if sample.rank in slow_ranks else (),
            )
            for operation in OPERATIONS
            for sample in (
                operation.group(group) if group else [s for s in operation.samples if not s.group]
            )
        ],
    )


def reference(operation: Operation, sample: Sample, x: Tensor) -> Tensor:
    with regfast.backend("reference"):
        return operation(x, sample)


def derivatives(operation: Operation, sample: Sample, x: Tensor, t: Tensor, grad: Tensor):
    """The output, the gradient of x for `grad`, and the tangent in direction t."""
    x = x.detach().requires_grad_()
    y = operation(x, sample)
    with no_synchronisation():
        (dx,) = torch.autograd.grad(y, x, grad)
    with torch.autograd.forward_ad.dual_level():
        dual = operation(torch.autograd.forward_ad.make_dual(x.detach(), t), sample)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    return y.detach(), dx, tangent


def check_against_reference(operation: Operation, sample: Sample, x: Tensor) -> None:
    """Compare the kernels' output, gradient and tangent with the float64 reference's."""
    exact = x.double()
    t, grad = torch.randn_like(exact), torch.randn_like(reference(operation, sample, exact))
    with regfast.backend("reference"):
        expected = derivatives(operation, sample, exact, t, grad)
    found = derivatives(operation, sample, x, t.to(x.dtype), grad.to(x.dtype))
    tolerance = FLOAT64 if x.dtype == torch.float64 else FLOAT32
    for place, (a, b) in enumerate(zip(found, expected)):
        assert a.dtype == x.dtype
        if place == 1 and operation.name == "max_blur_pool" and x.isnan().any():
            check_gradient_of_nan(x, a.double(), b, pool_window(sample), **tolerance)
        else:
            torch.testing.assert_close(a.double(), b, equal_nan=True, **tolerance)


@pytest.mark.parametrize(
    "operation,sample", [pytest.param(o, s, id=f"{o}-{s}") for o in OPERATIONS for s in o.samples]
)
def test_the_reference_is_what_scipy_and_numpy_compute(operation, sample):
    x = sample.input(torch.float64)
    expected = torch.from_numpy(operation.oracle(x.numpy(), sample))
    torch.testing.assert_close(reference(operation, sample, x), expected, **FLOAT64)


@pairs("core")
def test_kernels_agree_with_the_reference(operation, sample, device, kernels, poisoned):
    check_against_reference(operation, sample, sample.input(device=device))


@pytest.mark.slow
@pairs("")
def test_kernels_agree_with_the_reference_on_odd_samples(
    operation, sample, device, kernels, poisoned
):
    check_against_reference(operation, sample, sample.input(device=device))


@pairs("formats")
def test_kernels_agree_with_the_reference_channels_last(
    operation, sample, device, kernels, poisoned
):
    check_against_reference(operation, sample, sample.input(device=device, channels_last=True))


@pairs("main", slow_ranks=(3,))
def test_kernels_compute_float64_in_float64(operation, sample, device, kernels):
    check_against_reference(operation, sample, sample.input(torch.float64, device))


@pairs("formats", slow_ranks=(3,))
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_kernels_round_half_precision_once(operation, sample, dtype, device, kernels):
    x = sample.input(dtype, device)
    wide = reference(operation, sample, x.float())
    grad = torch.randn_like(wide).to(dtype)
    x.requires_grad_()
    y = operation(x, sample)
    (dx,) = torch.autograd.grad(y, x, grad)
    leaf = x.detach().float().requires_grad_()
    (wide_dx,) = torch.autograd.grad(reference(operation, sample, leaf), leaf, grad.float())
    for found, expected in ((y, wide), (dx, wide_dx)):
        assert found.dtype == dtype
        if found is dx and operation.name == "max_blur_pool" and sample.rank == 3:
            # The gradient of a volume is rounded three times: after the blur, after the maxima
            # along the slices, and after those of each slice. The first two round terms that may
            # cancel. No taps are negative, so the gradient for |grad| is the sum of the terms'
            # sizes.
            (sizes,) = torch.autograd.grad(
                reference(operation, sample, leaf), leaf, grad.float().abs()
            )
            assert (
                (found.float() - expected).abs()
                <= UNIT[dtype] * (2 * sizes + expected.abs()) + 1e-6
            ).all()
            continue
        # atol: where terms of order one cancel, float32's own error remains.
        torch.testing.assert_close(found.float(), expected, rtol=UNIT[dtype], atol=1e-6)


@pytest.mark.parametrize(
    "operation,sample",
    [
        pytest.param(o, s, id=f"{o}-{s}", marks=pytest.mark.slow if place else ())
        for o in OPERATIONS
        for place, s in enumerate(o.group("special"))
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf], ids=str)
def test_special_values_reach_the_same_outputs_and_the_same_inputs(
    operation, sample, value, device, kernels
):
    """Scattered inf and NaN; in a window of only -inf the first element takes the gradient."""
    x = sample.input(device=device)
    if value == -math.inf:
        x[..., :4, :4] = value
        x[..., -4:, -4:] = value
    else:
        x.view(-1)[torch.randperm(x.numel())[: x.numel() // 8]] = value
    check_against_reference(operation, sample, x)


@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"kernel_size": 3, "stride": 2, "padding": 1}], ids=["2 2 0", "3 2 1"]
)
def test_a_window_that_holds_a_nan_gives_its_gradient_to_one_of_its_own(
    arguments, activation, device, kernels
):
    """One NaN per image, at each place in turn."""
    sample = Sample((42, 1, 6, 7), arguments | {"activation": activation})
    x = sample.input(device=device)
    x.view(42, 42).fill_diagonal_(math.nan)
    check_against_reference(OPERATIONS[0], sample, x)
    grad = torch.randn_like(reference(OPERATIONS[0], sample, x))
    first, second = (derivatives(OPERATIONS[0], sample, x, x, grad)[1] for _ in range(2))
    assert torch.equal(first, second)


@pairs("main", slow_ranks=(1, 3))
def test_any_strides_in_and_the_memory_format_out(operation, sample, device, kernels):
    wide = torch.randn(*sample.shape[:-1], 2 * sample.shape[-1], device=device)
    plain = torch.randn(sample.shape, device=device)
    inputs = {
        "sliced": wide[..., ::2],
        "expanded batch": plain[:1].expand(sample.shape),
        "expanded channels": plain[:, :1].expand(sample.shape),
        "transposed": plain.transpose(-1, -2).contiguous().transpose(-1, -2),
        "channels last": as_format(plain, True),
        "channels last, sliced": as_format(wide, True)[..., ::2],
        "beside a multiple of 16 bytes": torch.randn(plain.numel() + 1, device=device)[1:].view(
            sample.shape
        ),
    }
    for name, x in inputs.items():
        leaf = x.detach().requires_grad_()
        y = operation(leaf, sample)
        expected = reference(operation, sample, x.contiguous())
        torch.testing.assert_close(y, expected, msg=lambda m, n=name: f"{n}: {m}", **FLOAT32)
        assert y.stride() == reference(operation, sample, x).stride(), name
        # .sum() sends back a gradient of stride 0.
        (dx,) = torch.autograd.grad(y.sum(), leaf)
        other = x.contiguous().requires_grad_()
        (expected_dx,) = torch.autograd.grad(reference(operation, sample, other).sum(), other)
        torch.testing.assert_close(dx, expected_dx, msg=lambda m, n=name: f"{n}: {m}", **FLOAT32)


def test_a_width_of_one_may_have_any_stride(device, kernels):
    x = torch.randn(1, 2, 4, 4, device=device, requires_grad=True)
    y, expected = (backend_pool(x, path, kernel_size=3) for path in ("triton", "reference"))
    for grad in (
        torch.randn(1, device=device).expand_as(y),
        torch.randn(1, 2, 1, 8, device=device)[..., ::8],
    ):
        found, wanted = (
            torch.autograd.grad(output, x, grad, retain_graph=True)[0] for output in (y, expected)
        )
        torch.testing.assert_close(found, wanted, **FLOAT32)
    narrow = torch.randn(1, 2, 4, 8, device=device)[..., ::8]
    arguments = dict(kernel_size=2, stride=1, padding=1, blur_size=(3, 3), padding_mode="replicate")
    found, wanted = (backend_pool(narrow, path, **arguments) for path in ("triton", "reference"))
    torch.testing.assert_close(found, wanted, **FLOAT32)


def backend_pool(x: Tensor, path: str, **arguments) -> Tensor:
    with regfast.backend(path):
        return pool(x, **arguments)


@pairs("main", slow_ranks=(3,))
def test_two_backward_runs_give_the_same_bits(operation, sample, device, kernels):
    x = sample.input(torch.float16, device).requires_grad_()
    grad = torch.randn_like(operation(x, sample))
    first, second = (torch.autograd.grad(operation(x, sample), x, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


@pairs("main", slow_ranks=(2, 3))
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_gradients_by_finite_differences(operation, sample, path, device, request):
    """First and second order, reverse and forward; no ties or zeros, which a step would cross."""
    if path == "triton":
        request.getfixturevalue("kernels")
    shape = operation.least(sample)
    count = math.prod(shape)
    x = (
        torch.randperm(count, device=device)
        .double()
        .sub_(count // 2 - 0.5)
        .view(shape)
        .div_(7)
        .requires_grad_()
    )

    def function(x):
        return operation(x, sample) if path == "triton" else reference(operation, sample, x)

    # Random directions: the interpreter would run a kernel for each of all directions.
    assert torch.autograd.gradcheck(function, (x,), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        function, (x,), fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pairs("main", slow_ranks=(2, 3))
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_the_ops_pass_opcheck(operation, sample, channels_last, device, kernels):
    x = sample.input(device=device, channels_last=channels_last)
    for op, arguments in operation.op_calls(x, operation(x, sample), sample):
        torch.library.opcheck(op, arguments)


@pairs("main", slow_ranks=(3,))
@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, marks=pytest.mark.slow), True], ids=["static", "dynamic"]
)
def test_kernels_compile_without_a_graph_break(operation, sample, dynamic, device, kernels):
    """Forward and backward, at two sizes. aot_eager traces like Inductor and runs ops eagerly."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: operation(x, sample), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for grow in (0, 2):
        shape = (*sample.shape[:2], *(size + grow for size in sample.shape[2:]))
        x = torch.randn(shape, device=device, requires_grad=True)
        y = compiled(x)
        grad = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, grad)
        expected = reference(operation, sample, x)
        torch.testing.assert_close(y, expected, **FLOAT32)
        torch.testing.assert_close(dx, torch.autograd.grad(expected, x, grad)[0], **FLOAT32)


@pytest.mark.slow
@pairs("main")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_reference_compiles_without_a_graph_break(operation, sample, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: operation(x, sample), fullgraph=True, dynamic=dynamic)
    for grow in (0, 3):
        shape = (*sample.shape[:2], *(size + grow for size in sample.shape[2:]))
        x = torch.randn(shape, requires_grad=True)
        y, expected = compiled(x), reference(operation, sample, x)
        grad = torch.randn_like(expected)
        torch.testing.assert_close(y, expected, **FLOAT32)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad), **FLOAT32
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected.detach(), **FLOAT32)


def test_the_compiled_code_follows_the_backend(device, kernels):
    """The choice is guarded: code compiled for one path does not serve the other."""
    sample = OPERATIONS[0].samples[0]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: OPERATIONS[0](x, sample), fullgraph=True, backend="aot_eager"
    )
    x = sample.input(device=device)
    with regfast.backend("reference"):
        compiled(x)
    assert not kernels
    compiled(x)
    assert len(kernels) == 1


@st.composite
def pools(draw):
    """Arguments and a shape that nn.MaxPool accepts."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    arguments = {
        "padding_mode": draw(st.sampled_from(["partial", "replicate", "reflect", "zeros"]))
    }
    kernel = [draw(st.integers(1, 4 if rank < 3 else 2)) for _ in range(rank)]
    arguments["kernel_size"] = tuple(kernel)
    arguments["stride"] = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    arguments["padding"] = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    arguments["dilation"] = tuple(draw(st.integers(1, 3 if rank < 3 else 2)) for _ in range(rank))
    arguments["ceil_mode"] = draw(st.booleans())
    if draw(st.booleans()):
        arguments["blur_size"] = tuple(
            draw(st.integers(1, 5 if rank < 3 else 3)) for _ in range(rank)
        )
    sizes = [draw(st.integers(1, 12 if rank < 3 else 5)) for _ in range(rank)]
    return Sample((1, draw(st.integers(1, 3)), *sizes), arguments)


@st.composite
def blurs(draw):
    """Arguments and a shape; some give no output."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    arguments = {"padding_mode": draw(st.sampled_from(["replicate", "reflect", "zeros"]))}
    arguments["kernel_size"] = tuple(
        draw(st.integers(1, 6 if rank < 3 else 3)) for _ in range(rank)
    )
    arguments["stride"] = tuple(draw(st.integers(1, 4 if rank < 3 else 2)) for _ in range(rank))
    if draw(st.booleans()):
        arguments["padding"] = tuple(
            draw(st.integers(0, 4 if rank < 3 else 2)) for _ in range(rank)
        )
    if draw(st.booleans()):
        arguments["activation"] = "relu"
    sizes = [draw(st.integers(1, 14 if rank < 3 else 5)) for _ in range(rank)]
    return Sample((1, draw(st.integers(1, 3)), *sizes), arguments)


def check_drawn(operation: Operation, sample: Sample, channels_last: bool, device: str) -> None:
    window = pool_window(sample) if operation.name == "max_blur_pool" else blur_window(sample)
    if all(output_size(window, axis, sample.shape[axis + 2]) >= 1 for axis in range(sample.rank)):
        check_against_reference(
            operation, sample, sample.input(device=device, channels_last=channels_last)
        )


# The kernels fixture deliberately spans all drawn examples: it counts their launches together.
DRAWN = dict(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
POOLINGS = [
    pytest.param(*pair, id=str(pair[0])) for pair in zip(OPERATIONS[:2], (pools(), blurs()))
]


@pytest.mark.parametrize("operation,samples", POOLINGS)
def test_kernels_agree_with_the_reference_on_drawn_arguments(
    operation, samples, device, kernels, poisoned
):
    @settings(max_examples=6, **DRAWN)
    @given(sample=samples, channels_last=st.booleans())
    def run(sample, channels_last):
        check_drawn(operation, sample, channels_last, device)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("operation,samples", POOLINGS)
def test_kernels_agree_with_the_reference_on_many_drawn_arguments(
    operation, samples, device, kernels, poisoned
):
    @settings(max_examples=50, **(DRAWN | {"derandomize": False}))
    @given(sample=samples, channels_last=st.booleans())
    def run(sample, channels_last):
        check_drawn(operation, sample, channels_last, device)

    run()


def blend(x: Tensor) -> Tensor:
    return mixup(x, torch.tensor([2, 0, 1], device=x.device), 0.25)


@pytest.mark.parametrize("function", [pool, blend])
@pytest.mark.parametrize("dims", ["batch", "rows", "columns", "channels"])
def test_offsets_past_two_to_the_31(function, dims, device, kernels):
    """Elements 2^30 apart along one dimension, where int32 offsets would wrap.

    The storage between the elements is not touched.
    """
    shape = (3, 3, 5, 6)
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of device memory")
    stride = [90, 30, 6, 1]
    dim = ["batch", "channels", "rows", "columns"].index(dims)
    stride[dim] = 2**30
    storage = torch.empty((shape[dim] - 1) * 2**30 + 1024, dtype=torch.float16, device=device)
    x = storage.as_strided(shape, stride)
    x.copy_(torch.randn(shape))
    torch.testing.assert_close(function(x), function(x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_torch_func_takes_the_reference(operation, device):
    for sample in operation.group("main"):
        x = sample.input(torch.float64, device)
        y, pull = torch.func.vjp(lambda x, sample=sample: operation(x, sample), x)
        grad = torch.randn_like(y)
        leaf = x.clone().requires_grad_()
        expected = operation(leaf, sample)
        torch.testing.assert_close(
            pull(grad)[0], torch.autograd.grad(expected, leaf, grad)[0], **FLOAT64
        )
        two = torch.stack([x, x.flip(-1)])
        each = torch.func.vmap(lambda x, sample=sample: operation(x, sample))(two)
        torch.testing.assert_close(
            each, torch.stack([operation(x, sample) for x in two]), **FLOAT64
        )
