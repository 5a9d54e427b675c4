"""rezero beyond the contract: gradients of stream and gate, mixed dtypes, valid alphas."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import regfast
from regfast.functional import rezero
from regfast.ops.rezero import ACTIVATIONS, FORMS

TORCH = {
    "identity": lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
# float32 sums in another order; a gate's gradient sums thousands of terms of order one.
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
SUM = dict(rtol=1e-4, atol=1e-3)
every = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(params=["reference", "triton"])
def path(request):
    """Both paths; on Triton's, a test that launches no kernel fails."""
    if request.param == "triton":
        request.getfixturevalue("kernels")
        yield "triton"
    else:
        with regfast.backend("reference"):
            yield "reference"


def written_out(x, f, alpha, activation, form):
    act = TORCH[activation]
    return x + alpha * act(f) if form == "gate" else act(x + alpha * f)


def inputs(shape, device, dtype=torch.float32):
    x, f = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    return x, f, torch.full((1,), 0.375, device=device, requires_grad=True)


@every
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_gradients_are_those_of_the_expression_written_out(path, activation, form, device):
    leaves = inputs((3, 5, 7, 29), device)
    found, expected = (function(*leaves, activation, form) for function in (rezero, written_out))
    torch.testing.assert_close(found, expected, **FLOAT32)
    grad = torch.randn_like(found)
    *gradients, dalpha = torch.autograd.grad(found, leaves, grad)
    *wanted, wanted_dalpha = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(gradients, wanted, **FLOAT32)
    torch.testing.assert_close(dalpha, wanted_dalpha, **SUM)
    assert dalpha.shape == (1,)


@every
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_an_unneeded_gradient_is_not_computed(path, form, wanted, device):
    leaves = [
        leaf.requires_grad_(place in wanted)
        for place, leaf in enumerate(inputs((2, 3, 11), device))
    ]
    found, expected = (function(*leaves, "relu", form) for function in (rezero, written_out))
    found.sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    assert [gradient is not None for gradient in gradients] == [
        place in wanted for place in range(3)
    ]
    for leaf, wanted_gradient in zip(
        (leaves[place] for place in wanted),
        torch.autograd.grad(expected.sum(), [leaves[p] for p in wanted]),
    ):
        torch.testing.assert_close(leaf.grad, wanted_gradient, **FLOAT32)


@every
def test_first_and_second_derivatives_by_finite_differences(path, form, device):
    """By stream, branch and gate together. Odd quarters, so that no step crosses a kink."""
    x, f = (
        (torch.randn(2, 3, device=device).mul(2).round() / 2 + 0.25).double().requires_grad_()
        for _ in range(2)
    )
    alpha = torch.full((), 0.5, dtype=torch.float64, device=device, requires_grad=True)
    for activation in ("relu", "gelu"):
        arguments = (lambda *leaves, a=activation: rezero(*leaves, a, form)), (x, f, alpha)
        assert torch.autograd.gradcheck(*arguments, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(
            *arguments, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
        )


def test_the_gate_s_gradient_has_the_same_bits_every_time(kernels, device):
    """Over more elements than one program has, and in float32 from half precision."""
    x, f, alpha = inputs((2, 40000), device, torch.float16)
    sums = [
        torch.autograd.grad(rezero(x, f, alpha), alpha, torch.ones_like(x))[0] for _ in range(3)
    ]
    assert all(torch.equal(s, sums[0]) for s in sums)
    torch.testing.assert_close(sums[0].double(), f.double().relu().sum().view(1), rtol=1e-6, atol=0)


@every
def test_a_program_of_the_backward_takes_several_blocks(kernels, form, device, monkeypatch):
    """As with more blocks than PROGRAMS: two programs, five blocks, the last not full."""
    from regfast.kernels import rezero as module

    monkeypatch.setattr(module, "PROGRAMS", 2)
    leaves = inputs((4, module.BLOCK + 5), device)
    grad = torch.randn(4, module.BLOCK + 5, device=device)
    *gradients, dalpha = torch.autograd.grad(rezero(*leaves, "relu", form), leaves, grad)
    *wanted, wanted_dalpha = torch.autograd.grad(written_out(*leaves, "relu", form), leaves, grad)
    torch.testing.assert_close(gradients, wanted, **FLOAT32)
    torch.testing.assert_close(dalpha, wanted_dalpha, **SUM)


def test_at_alpha_zero_the_stream_is_given_back(path, device):
    x, f, _ = inputs((2, 3, 700), device)
    for alpha in (
        0,
        0.0,
        torch.zeros((), device=device),
        torch.zeros(1, device=device),
        torch.zeros(1, 1, dtype=torch.float64),
    ):
        for activation in ACTIVATIONS:
            y = rezero(x, f, alpha, activation)
            assert torch.equal(y, x) and y.dtype == torch.float32 and y is not x
    assert rezero(x, torch.full_like(f, math.inf), 0).isnan().all()


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
@every
def test_stream_and_branch_have_dtypes_of_their_own(path, dtypes, form, device):
    """As under autocast. The result has the wider dtype; each gradient has its tensor's."""
    x, f, alpha = inputs((2, 3, 33), device)
    x, f = (t.detach().to(dtype).requires_grad_() for t, dtype in zip((x, f), dtypes))
    y = rezero(x, f, alpha, "relu", form)
    assert y.dtype == torch.promote_types(*dtypes) == torch.float32
    torch.testing.assert_close(y, written_out(x.float(), f.float(), alpha, "relu", form), **FLOAT32)
    gradients = torch.autograd.grad(y.sum(), (x, f, alpha))
    assert [g.dtype for g in gradients] == [x.dtype, f.dtype, torch.float32]


def test_autocast_leaves_the_dtypes_alone(path, device):
    x, f, alpha = inputs((2, 3, 33), device)
    with torch.autocast(device, torch.bfloat16):
        y = rezero(x, f, alpha)
    assert torch.equal(y, rezero(x, f, alpha)) and y.dtype == torch.float32


def test_any_layout_of_either(path, device):
    """The result has the stream's layout."""
    image = torch.randn(2, 4, 5, 6, device=device)
    wide = torch.randn(2, 4, 5, 12, device=device)
    layouts = [
        image,
        image.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        image[:1].expand(2, 4, 5, 6),
    ]
    for x in layouts:
        for f in layouts:
            leaves = [t.detach().requires_grad_() for t in (x, f)]
            y, expected = rezero(*leaves, 0.5), written_out(*leaves, 0.5, "relu", "gate")
            torch.testing.assert_close(y, expected, **FLOAT32)
            assert y.stride() == torch.empty_like(x).stride()
            for a, b in zip(
                torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
            ):
                torch.testing.assert_close(a, b, **FLOAT32)


def test_strides_of_axes_of_one_element_cost_no_copy():
    """A decoding step, and one-channel images: equal layouts, whatever that axis' stride is."""
    pytest.importorskip("triton")
    from regfast.kernels import rezero as module

    alike = [
        (torch.randn(3, 1, 8), torch.randn(1, 3, 8).transpose(0, 1)),
        (torch.randn(3, 1, 5, 6), torch.empty(3, 1, 5, 6, memory_format=torch.channels_last)),
    ]
    for like, t in alike:
        assert t.stride() != like.stride() and module._laid_out(t, like.stride()) is t
    expanded = torch.randn(1, 8).expand(3, 8)
    assert module._laid_out(expanded, (8, 1)).is_contiguous()


def test_relu_at_its_kink_and_at_nan(path, device):
    """The gradient is zero at zero, and torch's own at NaN."""
    f = torch.tensor([0.0, -0.0, math.nan, -1.0, 1.0, math.inf], device=device, requires_grad=True)
    x, alpha = torch.zeros(6, device=device), torch.full((1,), 2.0, device=device)
    for form in FORMS:
        found, expected = (
            function(x, f, alpha, "relu", form) for function in (rezero, written_out)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        grad = torch.tensor([math.inf, 1.0, 1.0, 1.0, 1.0, 1.0], device=device)
        gradients = [torch.autograd.grad(y, f, grad)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


# float32 values and slopes: the kernels are off by 5e-7, torch by 1.2e-6, a GPU's roots and powers
# by 2^-22.
GELU = dict(rtol=0, atol=2e-6)


@every
def test_gelu_is_that_of_float64(path, form, device):
    """Values and slopes along the whole curve and its tails.

    (At infinity torch's own is NaN in float32, on a CPU.)
    """
    infinite = [math.inf, -math.inf] if path == "triton" else []
    ends = torch.tensor([*infinite, math.nan, 0.0, -0.0, 1e30, -1e30], device=device)
    f = torch.cat((torch.linspace(-12, 12, 24001, device=device), ends)).requires_grad_()
    wide = f.detach().double().requires_grad_()
    found, expected = rezero(torch.zeros_like(f), f, 1.0, "gelu", form), F.gelu(wide)
    gradients = [
        torch.autograd.grad(y.sum(), leaf)[0].double() for y, leaf in ((found, f), (expected, wide))
    ]
    torch.testing.assert_close(found.double()[:-2], expected[:-2], **GELU, equal_nan=True)
    torch.testing.assert_close(found.double()[-2:], expected[-2:], rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients, **GELU, equal_nan=True)


@every
def test_gelu_of_float64_has_its_precision(path, form, device):
    f = torch.linspace(-12, 12, 2001, dtype=torch.float64, device=device, requires_grad=True)
    found, expected = (
        function(torch.zeros_like(f), f, 1.0, "gelu", form) for function in (rezero, written_out)
    )
    gradients = [torch.autograd.grad(y.sum(), f)[0] for y in (found, expected)]
    torch.testing.assert_close((found, gradients[0]), (expected, gradients[1]), rtol=0, atol=1e-14)


def test_an_empty_batch(path, device):
    x, f, alpha = inputs((0, 3), device)
    y = rezero(x, f, alpha)
    assert y.shape == (0, 3)
    assert torch.autograd.grad(y.sum(), alpha)[0].item() == 0
    if path == "triton":
        # An empty tensor launches nothing.
        rezero(torch.ones(1, device=device), torch.ones(1, device=device), alpha)


@every
def test_compiled_code_is_plain_pytorch(form):
    """The compiler fuses it with its neighbours; no graph break, and one graph for every gate."""
    torch._dynamo.reset()
    counted = CompileCounter()
    step = torch.compile(
        lambda x, f, alpha: rezero(x, f, alpha, "relu", form), fullgraph=True, backend=counted
    )
    x, f, _ = inputs((2, 3, 5), "cpu")
    for alpha in (torch.tensor([0.0]), torch.tensor([0.5])):
        torch.testing.assert_close(
            step(x, f, alpha), written_out(x, f, alpha, "relu", form), **FLOAT32
        )
    assert counted.frame_count == 1


def test_fx_traces_one_call():
    traced = torch.fx.symbolic_trace(lambda x, f, alpha: rezero(x, f, alpha, activation="silu"))
    assert [node.op for node in traced.graph.nodes] == ["placeholder"] * 3 + [
        "call_function",
        "output",
    ]
    x, f, alpha = inputs((2, 3), "cpu")
    assert torch.equal(traced(x, f, alpha), rezero(x, f, alpha, "silu"))


IMAGE = torch.randn(2, 3)


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize(
    "arguments,error,words",
    [
        (([1.0], IMAGE, 0.5), TypeError, ["x", "list", "Tensor"]),
        ((IMAGE, IMAGE.int(), 0.5), TypeError, ["f", "torch.int32", "floating-point"]),
        ((IMAGE, IMAGE[:1], 0.5), ValueError, ["(2, 3)", "(1, 3)", "one shape"]),
        ((IMAGE, IMAGE.to("meta"), 0.5), ValueError, ["cpu", "meta", "one device"]),
        ((IMAGE, IMAGE, "half"), TypeError, ["alpha", "str", "number"]),
        ((IMAGE, IMAGE, True), TypeError, ["alpha", "bool", "number"]),
        ((IMAGE, IMAGE, torch.zeros(2)), ValueError, ["alpha", "(2,)", "one element"]),
        (
            (IMAGE, IMAGE, torch.zeros(1).int()),
            TypeError,
            ["alpha", "torch.int32", "floating-point"],
        ),
        ((IMAGE, IMAGE, 0.5, "elu"), ValueError, ["activation", "'elu'", "'identity'", "'silu'"]),
        (
            (IMAGE, IMAGE, 0.5, ["relu"]),
            ValueError,
            ["activation", "['relu']", "'identity'", "'silu'"],
        ),
        ((IMAGE, IMAGE, 0.5, "relu", "pre"), ValueError, ["form", "'pre'", "'gate'", "'post'"]),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_bad_input(path, arguments, error, words):
    with regfast.backend(path), pytest.raises(error) as raised:
        rezero(*arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_the_ops_refuse_what_a_kernel_would_read_beyond(device):
    x, alpha = torch.randn(2, 3, device=device), torch.zeros(1, device=device)
    if device == "cpu":
        pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"f must have .*\(2, 3\).*got .*\(2, 2\)"):
        torch.ops.regfast.rezero(x, x[:, :2], alpha, "relu", "gate")
    with pytest.raises(ValueError, match="one element"):
        torch.ops.regfast.rezero(x, x, torch.zeros(2, device=device), "relu", "gate")
    with pytest.raises(ValueError, match=r"grad must have .*\(2, 3\).*got .*\(2, 2\)"):
        torch.ops.regfast.rezero_backward(
            x[:, :2], None, x, alpha, "relu", "gate", True, True, True
        )


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="the interpreter takes 20 ms for each of a million programs",
)
def test_offsets_past_two_to_the_31(kernels, device):
    """The last of 2^31 + 4 elements, where an int32 offset would have wrapped."""
    from regfast.kernels import rezero as module

    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of device memory")
    x = torch.ones(2**31 + 4, dtype=torch.float16, device=device)
    alpha = torch.full((1,), 0.5, device=device)
    y = module.rezero(x, x, alpha, "relu", "gate")
    assert (y[-8:] == 1.5).all()
    _, df, dalpha = module.rezero_backward(x, None, x, alpha, "relu", "gate", False, True, True)
    # Every term is one, so a program's 2^20 terms are exact in float32, and their sum to its last
    # bits.
    assert (df[-8:] == 0.5).all() and dalpha.item() == pytest.approx(2**31 + 4, rel=1e-6)
