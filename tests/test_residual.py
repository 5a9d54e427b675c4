"""Residual blocks start as their shortcuts, so that any depth trains from the first step."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import regfast
from regfast import (
    BottleneckBlock,
    ResidualBlock,
    ResidualLinear,
    ReZero,
    ReZeroTransformerEncoderLayer,
)

# float32 sums of some hundreds of products of order one, in another order.
ROUNDING = dict(rtol=1e-4, atol=1e-5)

BLOCKS = {
    "same": (lambda **a: ResidualBlock(4, 4, **a), (2, 4, 9, 8), (2, 4, 9, 8)),
    "wider": (lambda **a: ResidualBlock(4, 6, 5, **a), (2, 4, 9, 8), (2, 6, 9, 8)),
    "strided": (lambda **a: ResidualBlock(4, 4, stride=2, **a), (2, 4, 9, 8), (2, 4, 5, 4)),
    "antialiased": (
        lambda **a: ResidualBlock(4, 6, stride=2, antialias=True, **a),
        (2, 4, 9, 8),
        (2, 6, 5, 4),
    ),
    "bottleneck": (lambda **a: BottleneckBlock(8, 2, **a), (2, 8, 9, 8), (2, 8, 9, 8)),
    "bottleneck strided": (
        lambda **a: BottleneckBlock(4, 3, 2, 2, **a),
        (2, 4, 9, 8),
        (2, 6, 5, 4),
    ),
    "bottleneck antialiased": (
        lambda **a: BottleneckBlock(4, 3, (2, 1), antialias=True, **a),
        (2, 4, 9, 8),
        (2, 12, 5, 8),
    ),
    "linear": (lambda **a: ResidualLinear(5, 5, **a), (2, 3, 5), (2, 3, 5)),
    "linear wider": (lambda **a: ResidualLinear(5, 7, **a), (2, 5), (2, 7)),
}
blocks = pytest.mark.parametrize("make,shape,output", BLOCKS.values(), ids=list(BLOCKS))


@blocks
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU(), "gelu"], ids=str)
def test_at_first_a_block_is_its_shortcut(make, shape, output, activation):
    block, x = make(activation=activation).eval(), torch.randn(shape)
    y = block(x)
    assert y.shape == output
    assert torch.equal(y, block.shortcut(x))
    posted = make(activation=activation, form="post").eval()
    act = nn.GELU() if activation == "gelu" else activation
    assert torch.equal(posted(x), act(posted.shortcut(x)))


@blocks
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU()], ids=str)
def test_a_block_is_what_its_parts_say(make, shape, output, activation):
    """With the gate open, in both forms; without a gate, the block of He et al."""
    x = torch.randn(shape)
    for arguments in (dict(form="gate"), dict(form="post"), dict(ReZero=False)):
        block = make(activation=activation, **arguments).eval()
        shortcut, f = block.shortcut(x), block.branch(x)
        if block.alpha is None:
            expected = activation(shortcut + f)
        else:
            block.alpha.data.fill_(0.5)
            expected = (
                shortcut + block.alpha * activation(f)
                if block.form == "gate"
                else activation(shortcut + block.alpha * f)
            )
        found = block(x)
        torch.testing.assert_close(found, expected, **ROUNDING)
        torch.testing.assert_close(*(gradients(y, block) for y in (found, expected)), **ROUNDING)


def gradients(y: torch.Tensor, block: nn.Module) -> tuple[torch.Tensor, ...]:
    """The gradients of the mean by every parameter, of order one or less."""
    return torch.autograd.grad(y.square().mean(), list(block.parameters()))


@pytest.mark.parametrize("arguments", [{}, dict(form="post"), dict(ReZero=False)], ids=str)
def test_the_kernels_make_the_same_block(kernels, device, arguments):
    block = ResidualBlock(4, 6, stride=2, antialias=True, device=device, **arguments).eval()
    if block.alpha is not None:
        block.alpha.data.fill_(0.5)
    x, found = torch.randn(2, 4, 9, 8, device=device), []
    for backend in ("triton", "reference"):
        with regfast.backend(backend):
            y = block(x)
            found.append([y, *gradients(y, block)])
    torch.testing.assert_close(*found, **ROUNDING)


def test_the_branch_is_the_book_s():
    """Convolution, normalisation, activation, convolution, normalisation; 1x1 if shapes change."""
    block = ResidualBlock(4, 6, 5, 2)
    assert [type(layer) for layer in block.branch] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    assert [layer.stride for layer in block.branch if isinstance(layer, nn.Conv2d)] == [
        (2, 2),
        (1, 1),
    ]
    assert [type(layer) for layer in block.shortcut] == [nn.Conv2d, nn.BatchNorm2d]
    assert isinstance(ResidualBlock(4, 4).shortcut, nn.Identity)
    bare = ResidualBlock(4, 4, norm_layer=None)
    assert [type(layer) for layer in bare.branch] == [
        nn.Conv2d,
        nn.ReLU,
        nn.Conv2d,
    ] and bare.branch[0].bias is not None
    assert [
        layer.stride for layer in BottleneckBlock(4, 3, 2).branch if isinstance(layer, nn.Conv2d)
    ] == [(1, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU()], ids=str)
def test_an_antialiased_block_blurs_after_the_activation(activation):
    """The branch has the chapter's order; the shortcut blurs before its convolution.

    The plain block's checkpoint fits.
    """
    x = torch.randn(2, 4, 9, 8)
    block = ResidualBlock(4, 6, stride=2, activation=activation, antialias=True).eval()
    block.load_state_dict(
        ResidualBlock(4, 6, stride=2, activation=activation).state_dict(), strict=True
    )
    parts, blur = block.branch, regfast.BlurPool2d(3, 2)
    assert parts.conv1.stride == (1, 1)
    f = parts.norm2(parts.conv2(blur(activation(parts.norm1(parts.conv1(x))))))
    torch.testing.assert_close(parts(x), f, **ROUNDING)
    convolved = F.conv2d(blur(x), block.shortcut[0].weight)
    torch.testing.assert_close(block.shortcut(x), block.shortcut[1](convolved), **ROUNDING)


@pytest.mark.parametrize(
    "make",
    [functools.partial(ResidualBlock, stride=2), functools.partial(BottleneckBlock, stride=2)],
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU()], ids=str)
def test_a_converted_block_is_an_antialiased_one(make, activation):
    x = torch.randn(2, 4, 9, 8)
    built, converted = (
        make(4, 6, activation=activation, antialias=True).eval(),
        make(4, 6, activation=activation).eval(),
    )
    built.alpha.data.fill_(0.5)
    converted.load_state_dict(built.state_dict(), strict=True)
    torch.testing.assert_close(
        regfast.antialias(converted, min_channels=1)(x), built(x), **ROUNDING
    )


@blocks
def test_blocks_copy_pickle_and_take_factory_arguments(make, shape, output):
    block, x = make().eval(), torch.randn(shape)
    block.alpha.data.fill_(0.5)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert repr(copied) == repr(block) and torch.equal(copied(x), block(x))
    assert block.alpha.shape == (1,) and "alpha" in block.state_dict()
    assert "alpha" not in make(ReZero=False).state_dict()
    made = make(device="meta", dtype=torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16} and {
        p.device.type for p in made.parameters()
    } == {"meta"}


@blocks
@pytest.mark.parametrize("ReZero", [True, False])
def test_blocks_compile_export_and_trace(make, shape, output, ReZero):
    torch._dynamo.reset()
    block, x = make(ReZero=ReZero).eval(), torch.randn(shape)
    if ReZero:
        block.alpha.data.fill_(0.5)
    exported = torch.export.export(block, (x,)).module()
    for traced in (
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        exported,
        torch.fx.symbolic_trace(block),
    ):
        torch.testing.assert_close(traced(x), block(x), **ROUNDING)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@blocks
def test_memory_format_is_kept(make, shape, output, memory_format):
    if len(shape) != 4:
        memory_format = torch.contiguous_format
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    for arguments in ({}, dict(form="post"), dict(ReZero=False)):
        assert (
            make(**arguments)
            .to(memory_format=memory_format)(x)
            .is_contiguous(memory_format=memory_format)
        )


@pytest.mark.parametrize(
    "make", [ResidualBlock, functools.partial(BottleneckBlock, expansion=1)], ids=["two", "three"]
)
def test_a_checkpoint_fits_every_kind_of_a_block(make):
    """Antialiased or not, and in either form: the same keys, a part of the interface."""
    keys = set(make(2, 3, stride=2, norm_layer=None).state_dict())
    places = [place for place in ("1", "2", "3") if f"branch.conv{place}.weight" in keys]
    names = {f"branch.conv{place}.{name}" for place in places for name in ("weight", "bias")}
    assert keys == {"alpha", "shortcut.0.weight", "shortcut.0.bias"} | names
    checkpoint = make(2, 3, stride=2).state_dict()
    for arguments in (
        dict(antialias=True),
        dict(form="post", activation="gelu"),
        dict(activation=nn.ELU(), antialias=True),
    ):
        make(2, 3, stride=2, **arguments).load_state_dict(checkpoint, strict=True)


def test_the_keys_of_the_other_blocks():
    assert list(ResidualLinear(2, 3).state_dict()) == [
        "alpha", "branch.0.weight", "branch.0.bias", "branch.2.weight", "branch.2.bias",
        "shortcut.weight",
    ]  # fmt: skip
    theirs, ours = (
        layer(8, 2, 16) for layer in (nn.TransformerEncoderLayer, ReZeroTransformerEncoderLayer)
    )
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["alpha"] and all(key.startswith("norm") for key in unexpected)


def test_repr_shows_what_a_block_is():
    assert repr(ReZero(nn.Identity())) == (
        "ReZero(\n  form='gate', activation='identity'\n"
        "  (branch): Identity()\n  (shortcut): Identity()\n)"
    )
    plain = repr(ResidualBlock(2, 2, ReZero=False))
    assert (
        "form='post', alpha=None" in plain
        and "(activation): ReLU()" in plain
        and "(norm2): BatchNorm2d(2" in plain
    )


def test_any_normalisation():
    """It is made on the block's device and in its dtype."""
    block = ResidualBlock(
        4, 6, stride=2, norm_layer=functools.partial(nn.GroupNorm, 2), dtype=torch.float64
    )
    assert isinstance(block.branch.norm2, nn.GroupNorm) and isinstance(
        block.shortcut[1], nn.GroupNorm
    )
    assert block(torch.randn(2, 4, 9, 8, dtype=torch.float64)).dtype == torch.float64


def test_under_autocast_the_stream_keeps_its_precision():
    """The branch is in half precision; the stream stays in float32."""
    image, rows = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 8)
    layers = [
        (ResidualBlock(4, 4), image),
        (ResidualLinear(8, 8), rows),
        (ReZeroTransformerEncoderLayer(8, 2, 16), rows),
    ]
    for layer, x in layers:
        layer.alpha.data.fill_(0.5)
        kinds = []
        layer.get_submodule(
            "branch.conv2" if x is image else "linear2" if hasattr(layer, "linear2") else "branch.2"
        ).register_forward_hook(lambda _module, _args, y, kinds=kinds: kinds.append(y.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.float32 and kinds == [torch.bfloat16]
        y.sum().backward()
        assert layer.alpha.grad.dtype == torch.float32 and layer.alpha.grad.isfinite().all()


def test_any_module_is_a_branch():
    branch, shortcut, x = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(3, 4)
    layer = ReZero(branch, shortcut, F.elu)
    layer.alpha.data.fill_(0.5)
    torch.testing.assert_close(layer(x), shortcut(x) + 0.5 * F.elu(branch(x)), **ROUNDING)
    attention = ReZero(nn.Bilinear(4, 4, 4))
    assert torch.equal(attention(x, x), x) and torch.equal(attention(x, input2=x), x)
    lazy = ReZero(nn.LazyLinear(4))
    assert torch.equal(lazy(x), x)


def test_fx_traces_a_branch_with_extra_arguments():
    """Within a network: fx cannot trace a root module with *args."""
    network, x = (
        nn.Sequential(nn.Linear(4, 4), ReZero(nn.Linear(4, 4), activation=nn.Tanh())),
        torch.randn(3, 4),
    )
    network[1].alpha.data.fill_(0.5)
    traced = torch.fx.symbolic_trace(network)
    assert torch.equal(traced(x), network(x))
    assert "rezero" in [getattr(node.target, "__name__", "") for node in traced.graph.nodes]


@pytest.mark.parametrize(
    "activation,fused",
    [
        ("relu", True), (None, True), (nn.ReLU(inplace=True), True), (nn.Identity(), True),
        (nn.GELU(), True), (nn.SiLU(), True),
        (nn.LeakyReLU(), True), (F.relu, True), (torch.relu, True), (F.gelu, True),
        (nn.GELU(approximate="tanh"), False),
        (nn.LeakyReLU(0.2), False), (nn.PReLU(), False), (torch.tanh, False), (nn.Tanh(), False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
@pytest.mark.parametrize("form", ["gate", "post"])
def test_an_activation_is_fused_where_it_is_one_of_the_operation_s(
    activation, fused, form, monkeypatch
):
    names = []

    def spy(x, f, alpha, name, form="gate"):
        names.append(name)
        return regfast.functional.rezero(x, f, alpha, name, form)

    monkeypatch.setattr(sys.modules[ReZero.__module__], "rezero", spy)
    x = torch.randn(3, 4)
    layer = ReZero(nn.Linear(4, 4), activation=activation, form=form)
    layer.alpha.data.fill_(-0.5)
    act = nn.Identity() if activation is None else F.relu if activation == "relu" else activation
    f = layer.branch(x)
    expected = x - 0.5 * act(f.clone()) if form == "gate" else act(x - 0.5 * f)
    torch.testing.assert_close(layer(x), expected, **ROUNDING)
    assert (names[0] != "identity" or isinstance(act, nn.Identity)) == fused


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_an_activation_is_called(kind):
    activation, called = nn.ReLU(), []
    getattr(activation, f"register_{kind}_hook")(lambda *_: called.append(True))
    ReZero(nn.Linear(4, 4), activation=activation)(torch.randn(3, 4)).sum().backward()
    assert called


@pytest.mark.parametrize("make", [ResidualBlock, BottleneckBlock, ResidualLinear])
def test_blocks_do_not_share_the_activation_that_they_were_not_given(make):
    """Each block copies the default activation: a change to one block's reaches no other."""
    one, other = make(4, 4), make(4, 4)
    assert isinstance(one.activation, nn.ReLU) and one.activation is not other.activation
    own = nn.ReLU()
    assert make(4, 4, activation=own).activation is own


def test_a_function_need_not_be_hashable():
    class Scale(list):
        def __call__(self, f):
            return self[0] * f

    layer, x = ReZero(nn.Linear(4, 4), activation=Scale([2.0])), torch.randn(3, 4)
    layer.alpha.data.fill_(0.5)
    torch.testing.assert_close(layer(x), x + layer.branch(x), **ROUNDING)


def test_surgery_on_an_activation_is_obeyed():
    layer, x = ReZero(nn.Linear(4, 4), activation=nn.ReLU()), torch.randn(3, 4)
    layer.alpha.data.fill_(1.0)
    layer.activation = nn.Tanh()
    torch.testing.assert_close(layer(x), x + torch.tanh(layer.branch(x)), **ROUNDING)


CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MASKS = {
    "none": {},
    "causal": dict(mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True),
    "causal, to be found out": dict(mask=nn.Transformer.generate_square_subsequent_mask(5)),
    "causal, of bool": dict(mask=CAUSAL, is_causal=True),
    "bool": dict(mask=torch.eye(5).bool()),
    "float": dict(mask=torch.randn(5, 5)),
    "padding": dict(src_key_padding_mask=PADDED),
    "padding of float": dict(src_key_padding_mask=torch.zeros(2, 5).masked_fill(PADDED, -math.inf)),
    "both": dict(mask=CAUSAL, src_key_padding_mask=PADDED),
}


def encoder(layers: int = 3, **arguments) -> nn.TransformerEncoder:
    """torch's encoder with our layers, gates open; no dropout, so training equals evaluation."""
    layer = ReZeroTransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", **arguments)
    made = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for place, own in enumerate(made.layers, start=1):
        own.alpha.data.fill_(0.25 * place)
    return made


def sublayers(network: nn.TransformerEncoder, x: torch.Tensor, masks: dict) -> torch.Tensor:
    """The layers' computation, written out."""
    attention = dict(
        attn_mask=masks.get("mask"),
        key_padding_mask=masks.get("src_key_padding_mask"),
        need_weights=False,
    )
    for own in network.layers:
        x = x + own.alpha * own.self_attn(x, x, x, **attention)[0]
        x = x + own.alpha * own.linear2(F.gelu(own.linear1(x)))
    return x


@pytest.mark.parametrize("masks", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_transformer_layer_works_in_torch_s_encoder(masks, batch_first):
    """Training, evaluation and torch's attention fast path give the sublayers' sum, unwarned."""
    network = encoder(batch_first=batch_first)
    x = torch.randn((2, 5, 8) if batch_first else (5, 2, 8))
    expected = sublayers(network, x, masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(network(x, **masks), expected, **ROUNDING)
        network.eval()
        torch.testing.assert_close(network(x, **masks), expected, **ROUNDING)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                torch.testing.assert_close(network(x, **masks), expected, **ROUNDING)
        if "src_key_padding_mask" not in masks:
            alone = x[0] if batch_first else x[:, 0]
            torch.testing.assert_close(
                network(alone, **masks), sublayers(network, alone, masks), **ROUNDING
            )


def test_the_hint_that_a_mask_is_causal_reaches_the_attention():
    """The caller or torch's encoder sets the hint; with it a kernel needs no mask."""
    network, hints = encoder(1), []
    network.layers[0].self_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: hints.append(kwargs["is_causal"]), with_kwargs=True
    )
    for masks in ("causal", "causal, to be found out", "float"):
        network(torch.randn(5, 2, 8), **MASKS[masks])
    assert hints == [True, True, False]


@pytest.mark.parametrize("batch_first", [True, False])
def test_at_first_an_encoder_gives_its_input_back(batch_first):
    """In training with dropout, too; each copy that torch's encoder makes has its own gate."""
    layer = ReZeroTransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    network = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    assert torch.equal(network(x), x) and torch.equal(
        network(x, mask=CAUSAL if batch_first else CAUSAL[:2, :2]), x
    )
    assert len({id(parameter) for parameter in network.parameters()}) == 3 * len(
        list(layer.parameters())
    )


def test_torch_s_encoder_with_its_defaults():
    """torch's encoder warns once that it uses no nested tensors for another layer class."""
    layer = ReZeroTransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match="was not TransformerEncoderLayer") as said:
        network = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8)).eval()
    assert len(said) == 1
    x = torch.randn(2, 5, 8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        # Left-aligned, in evaluation: torch's own layer would receive a nested tensor.
        torch.testing.assert_close(network(x, src_key_padding_mask=PADDED), network.norm(x))


def test_encoders_compile_export_and_trace():
    network, x = encoder(2, batch_first=True).eval(), torch.randn(2, 5, 8)
    expected = network(x)
    for captured in (
        torch.compile(network, fullgraph=True, backend="aot_eager"),
        torch.export.export(network, (x,)).module(),
        torch.fx.symbolic_trace(nn.Sequential(*network.layers)),
    ):
        torch.testing.assert_close(captured(x), expected, **ROUNDING)
    causal = dict(mask=CAUSAL, is_causal=True, src_key_padding_mask=PADDED)
    compiled = torch.compile(network.train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **causal), network(x, **causal), **ROUNDING)


def test_the_transformer_layer_s_own_ways():
    """dtype, no biases, dropout, copies."""
    layer = ReZeroTransformerEncoderLayer(8, 2, 16, dropout=0.5, bias=False, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    assert not [name for name, _ in layer.named_parameters() if "bias" in name]
    layer.alpha.data.fill_(0.5)
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    made = ReZeroTransformerEncoderLayer(8, 2, 16, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}


def test_the_transformer_layer_s_signature_is_torch_s_without_the_normalisations():
    """The same order up to the normalisations; a positional layer_norm_eps raises an error."""
    theirs, ours = (
        inspect.signature(layer).parameters
        for layer in (nn.TransformerEncoderLayer, ReZeroTransformerEncoderLayer)
    )
    assert list(ours) == [name for name in theirs if name not in ("layer_norm_eps", "norm_first")]
    assert all(p.default == theirs[name].default for name, p in ours.items())
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)] and "activation" in positional
    forwards = (
        inspect.signature(layer.forward)
        for layer in (nn.TransformerEncoderLayer, ReZeroTransformerEncoderLayer)
    )
    assert len({tuple(forward.parameters) for forward in forwards}) == 1


def test_gates_have_an_optimizer_group_of_their_own():
    """No weight decay, and a separate learning rate; each trainable parameter is in one group."""
    shared, tied, frozen = (
        ResidualLinear(4, 4),
        ResidualLinear(4, 4),
        ResidualBlock(2, 2).requires_grad_(False),
    )
    tied.alpha = shared.alpha
    # Gates are found by their module, not by their name.
    other = nn.ParameterDict({"alpha": torch.ones(1)})
    layers = [
        shared,
        shared,
        tied,
        frozen,
        ResidualLinear(4, 4, ReZero=False),
        ReZeroTransformerEncoderLayer(8, 2, 16),
        other,
    ]
    model = nn.ModuleList(layers)
    others, gates = regfast.parameter_groups(model, alpha_lr=0.5)
    assert [id(p) for p in gates["params"]] == [id(shared.alpha), id(model[5].alpha)]
    ids = [id(p) for p in others["params"] + gates["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert "lr" not in regfast.parameter_groups(model)[1]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_take_the_groups(kind):
    """With weight decay as the only force, gates stay and other parameters shrink."""
    model = nn.Sequential(ResidualLinear(4, 4), ReZero(nn.Linear(4, 4)))
    model[0].alpha.data.fill_(2.0)
    optimizer = kind(regfast.parameter_groups(model, alpha_lr=0.5), lr=0.1, weight_decay=0.5)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.5),
        (0.5, 0.0),
    ]
    before = model[0].branch[0].weight.abs().sum().item()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model[0].alpha.item() == 2.0 and model[0].branch[0].weight.abs().sum() < before
    model[0].alpha.grad.fill_(1.0)
    optimizer.step()
    assert model[0].alpha.item() < 1.9


def test_groups_of_what_is_frozen_or_compiled():
    model = nn.Sequential(nn.Linear(4, 4), ResidualLinear(4, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match="gate"):
        regfast.parameter_groups(model)
    model[1].alpha.requires_grad_(True)
    others, gates = regfast.parameter_groups(torch.compile(model, backend="eager"), 0)
    assert others["params"] == [] and gates["params"] == [model[1].alpha] and gates["lr"] == 0
    torch.optim.AdamW([others, gates], lr=0.1)


@pytest.mark.slow
def test_gates_are_sharded():
    """torch's fully_shard refuses 0-d parameters; the groups hold the shards."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(ResidualLinear(4, 4), ReZero(nn.Linear(4, 4), activation="relu"))
        x, expected = torch.randn(3, 4), copy.deepcopy(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(regfast.parameter_groups(model), lr=0.5)
        for network in (model, expected):
            network(x).square().sum().backward()
        optimizer.step()
        gates = [layer.alpha.full_tensor() for layer in model]
        torch.testing.assert_close(gates, [-0.5 * layer.alpha.grad for layer in expected])
    finally:
        distributed.destroy_process_group()


def test_bad_arguments():
    for call, error, words in [
        (lambda: ResidualBlock(4, 4, 2), ValueError, ["kernel_size", "odd", "2"]),
        (lambda: ResidualBlock(4, 4, stride=0), ValueError, ["stride", "0"]),
        (lambda: ResidualBlock(4, 4, activation="elu"), ValueError,
         ["activation", "'elu'", "'relu'"]),
        (lambda: ResidualBlock(4, 4, activation=F.relu), TypeError, ["activation", "module"]),
        (lambda: ResidualBlock(4, 4, ReZero=1), TypeError, ["ReZero", "1", "True or False"]),
        (lambda: BottleneckBlock(4, 4, expansion=0), ValueError, ["expansion", "0", "at least 1"]),
        (lambda: ResidualBlock(4, 8, stride=0), ValueError, ["stride", "0", "at least 1"]),
        (lambda: ResidualBlock(4, 8, stride="2"), TypeError, ["stride", "'2'", "integer"]),
        (lambda: ResidualBlock(4, 8.0), TypeError, ["channels", "8.0", "integer"]),
        (lambda: ResidualBlock(0, 8), ValueError, ["in_channels", "0", "at least 1"]),
        (lambda: ResidualBlock(4, 4, True), TypeError, ["kernel_size", "True", "integer"]),
        (lambda: ResidualBlock(4, 4, antialias=1), TypeError, ["antialias", "1", "True or False"]),
        (lambda: ResidualBlock(4, 4, norm_layer="batch"), TypeError,
         ["norm_layer", "'batch'", "None"]),
        (lambda: ResidualBlock(4, 4, activation=nn.ReLU), TypeError,
         ["activation", "ReLU", "module"]),
        (lambda: ResidualBlock(4, 4, form=None), ValueError, ["form", "None", "'post'"]),
        (lambda: BottleneckBlock(4, 4, (2, 0)), ValueError, ["stride", "(2, 0)", "at least 1"]),
        (lambda: ResidualLinear(4, -1), ValueError, ["out_features", "-1", "at least 1"]),
        (lambda: ReZeroTransformerEncoderLayer(8, 3), ValueError, ["nhead", "8", "3"]),
        (lambda: ReZeroTransformerEncoderLayer(8, 0), ValueError, ["nhead", "0", "at least 1"]),
        (lambda: ReZeroTransformerEncoderLayer(8, 2, activation=None), TypeError,
         ["activation", "None", "function"]),
        (lambda: ReZero(nn.Identity(), activation=nn.ReLU), TypeError,
         ["activation", "ReLU", "module"]),
        (lambda: regfast.parameter_groups(ResidualLinear(2, 2), alpha_lr="1e-3"), TypeError,
         ["alpha_lr", "'1e-3'", "number"]),
        (lambda: regfast.parameter_groups(ResidualLinear(2, 2), alpha_lr=math.nan), ValueError,
         ["alpha_lr", "nan"]),
        (lambda: ReZero(F.relu), TypeError, ["branch", "module", "function"]),
        (lambda: ReZero(nn.Identity(), F.relu), TypeError, ["shortcut", "module", "function"]),
        (lambda: ReZero(nn.Identity(), activation=3), TypeError, ["activation", "3"]),
        (lambda: ReZero(nn.Identity(), form="pre"), ValueError, ["form", "'pre'", "'gate'"]),
        (lambda: ReZeroTransformerEncoderLayer(8, 2, activation="elu"), ValueError,
         ["activation", "'elu'"]),
        (lambda: regfast.parameter_groups(nn.Linear(2, 2)), ValueError, ["gate", "none"]),
        (lambda: regfast.parameter_groups(ResidualLinear(2, 2), alpha_lr=-1), ValueError,
         ["alpha_lr", "-1"]),
        (lambda: regfast.parameter_groups([]), TypeError, ["model", "list"]),
    ]:  # fmt: skip
        with pytest.raises(error) as raised:
            call()
        assert all(word in str(raised.value) for word in words), str(raised.value)


def train(
    network: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float
) -> list[float]:
    """The loss before each step of Adam, relative to that of the classes' frequencies."""
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=lr), []
    frequencies = y.bincount() / len(y)
    for _ in range(steps):
        loss = F.cross_entropy(network(x), y)
        losses.append(loss.item() / -(frequencies * frequencies.log()).sum().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that no linear map separates: four classes by the signs of two products."""
    x = torch.randn(128, 16)
    return x, (x[:, 0] * x[:, 1] > 0).long() * 2 + (x[:, 2] * x[:, 3] > 0).long()


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """Images in two classes, by the brighter half."""
    x = torch.randn(64, 3, 12, 12)
    return x, (x[:, 0, :6].mean((1, 2)) > x[:, 0, 6:].mean((1, 2))).long()


def rows_network(blocks: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*blocks, nn.Linear(16, 4))


def halves_network(blocks: list[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def initialise(network: nn.Module, init: str) -> None:
    """torch's initial weights, or those of He et al., for layers before a ReLU."""
    for layer in network.modules():
        if init == "he" and isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def three(make, around, depth: int, init: str) -> list[nn.Module]:
    """The same weights in three networks: with gates, with shortcuts alone, and in a chain."""
    ungated = around([make(ReZero=False) for _ in range(depth)])
    initialise(ungated, init)
    gated = around([make() for _ in range(depth)])
    missing, _ = gated.load_state_dict(ungated.state_dict(), strict=False)
    assert len(missing) == depth and all(key.endswith("alpha") for key in missing)
    chain = copy.deepcopy(ungated)
    for layer in chain:
        if layer.__class__ in (ResidualBlock, ResidualLinear):
            layer.shortcut = Nothing()
    return [gated, ungated, chain]


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_gradients_reach_a_thousand_linear_layers():
    """In the first step only gates have gradients, as they multiply branches; later all do."""
    x, y = rows()
    network = rows_network([ResidualLinear(16, 16) for _ in range(500)])
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=3e-3), []
    for step in range(4):
        loss = F.cross_entropy(network(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        largest = {
            name: parameter.grad.abs().max().item()
            for name, parameter in network.named_parameters()
        }
        assert all(math.isfinite(size) for size in largest.values())
        assert {name for name, size in largest.items() if not size} == {
            name for name in largest if step == 0 and "branch" in name
        }
        optimizer.step()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses


def test_a_thousand_linear_layers_without_gates_carry_no_signal():
    """With the same weights, a chain ignores its input, without a gradient; shortcuts blow up."""
    x, y = rows()
    gated, ungated, chain = three(
        functools.partial(ResidualLinear, 16, 16), rows_network, 500, "torch"
    )
    assert F.cross_entropy(gated(x), y) < 3
    assert not F.cross_entropy(ungated(x), y) < 100
    logits = chain(x)
    assert logits.std(0).max() < 1e-6
    F.cross_entropy(logits, y).backward()
    assert chain[0].branch[0].weight.grad.abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("init", ["torch", "he"])
def test_a_thousand_linear_layers_train_where_plain_ones_do_not(init):
    """From the same weights. Plain networks reach the loss of the classes' frequencies at best."""
    x, y = rows()
    gated, *plain = (
        train(network, x, y, 25, 3e-3)
        for network in three(functools.partial(ResidualLinear, 16, 16), rows_network, 500, init)
    )
    assert (
        gated[0] < 2
        and all(later < earlier for earlier, later in itertools.pairwise(gated[:10]))
        and gated[-1] < 0.2
    ), gated
    for losses in plain:
        assert not min(losses) < 0.98, losses


@pytest.mark.slow
@pytest.mark.parametrize("init,plain", [("torch", "chain"), ("he", "ungated")])
def test_a_convolutional_network_of_56_layers_trains_where_plain_ones_do_not(init, plain):
    """Without normalisation: 27 blocks of two layers, a stem and a head.

    In a chain torch's initial weights let the signal vanish; with shortcuts He et al.'s weights
    blow it up. (At this depth and with small steps, each may train with the other's weights. Gates
    train with both.)
    """
    x, y = halves()
    make = functools.partial(ResidualBlock, 8, 8, norm_layer=None)
    networks = dict(zip(("gated", "ungated", "chain"), three(make, halves_network, 27, init)))
    gated, losses = (train(networks[name], x, y, 40, 5e-3) for name in ("gated", plain))
    assert gated[0] < 2 and gated[-1] < 0.5, gated
    assert not min(losses) < 0.95, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [ResidualBlock, functools.partial(BottleneckBlock, expansion=1)], ids=["two", "three"]
)
def test_a_deep_normalised_network_trains_too(make):
    """With the blocks' default arguments."""
    x, y = halves()
    losses = train(halves_network([make(8, 8) for _ in range(27)]), x, y, 30, 5e-3)
    assert losses[-1] < 0.3, losses


@pytest.mark.parametrize("antialias", [False, True])
def test_blocks_are_made_under_a_fake_tensor_mode(antialias):
    """As in planning a network without memory."""
    with FakeTensorMode():
        block = regfast.ResidualBlock(3, 8, stride=2, antialias=antialias)
        assert block(torch.randn(2, 3, 8, 8)).shape == (2, 8, 4, 4)
        assert regfast.BottleneckBlock(3, 2, 2, antialias=antialias)(
            torch.randn(2, 3, 8, 8)
        ).shape == (2, 8, 4, 4)
