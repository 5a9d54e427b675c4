"""The residual blocks: at first they are their shortcuts, so that any depth trains from the first step."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regfast
from regfast import BottleneckBlock, ResidualBlock, ResidualLinear, ReZero, ReZeroTransformerEncoderLayer

# Sums of some hundreds of products of order one in float32, in another order.
ROUNDING = dict(rtol=1e-4, atol=1e-5)

BLOCKS = {
    "same": (lambda **a: ResidualBlock(4, 4, **a), (2, 4, 9, 8), (2, 4, 9, 8)),
    "wider": (lambda **a: ResidualBlock(4, 6, 5, **a), (2, 4, 9, 8), (2, 6, 9, 8)),
    "strided": (lambda **a: ResidualBlock(4, 4, stride=2, **a), (2, 4, 9, 8), (2, 4, 5, 4)),
    "antialiased": (lambda **a: ResidualBlock(4, 6, stride=2, antialias=True, **a), (2, 4, 9, 8), (2, 6, 5, 4)),
    "bottleneck": (lambda **a: BottleneckBlock(8, 2, **a), (2, 8, 9, 8), (2, 8, 9, 8)),
    "bottleneck strided": (lambda **a: BottleneckBlock(4, 3, 2, 2, **a), (2, 4, 9, 8), (2, 6, 5, 4)),
    "bottleneck antialiased": (lambda **a: BottleneckBlock(4, 3, (2, 1), antialias=True, **a), (2, 4, 9, 8), (2, 12, 5, 8)),
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
    """With the gate open, in both forms; and without a gate, the block of He et al."""
    x = torch.randn(shape)
    for arguments in (dict(form="gate"), dict(form="post"), dict(ReZero=False)):
        block = make(activation=activation, **arguments).eval()
        shortcut, f = block.shortcut(x), block.branch(x)
        if block.alpha is None:
            expected = activation(shortcut + f)
        else:
            block.alpha.data.fill_(0.5)
            expected = shortcut + 0.5 * activation(f) if block.form == "gate" else activation(shortcut + 0.5 * f)
        torch.testing.assert_close(block(x), expected, **ROUNDING)


def test_the_branch_is_the_book_s():
    """Convolution, normalisation, activation, convolution, normalisation; one pixel's convolution where shapes change."""
    block = ResidualBlock(4, 6, 5, 2)
    assert [type(layer) for layer in block.branch] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]
    assert [layer.stride for layer in block.branch if isinstance(layer, nn.Conv2d)] == [(2, 2), (1, 1)]
    assert [type(layer) for layer in block.shortcut] == [nn.Conv2d, nn.BatchNorm2d]
    assert isinstance(ResidualBlock(4, 4).shortcut, nn.Identity)
    bare = ResidualBlock(4, 4, norm_layer=None)
    assert [type(layer) for layer in bare.branch] == [nn.Conv2d, nn.ReLU, nn.Conv2d] and bare.branch[0].bias is not None
    assert [layer.stride for layer in BottleneckBlock(4, 3, 2).branch if isinstance(layer, nn.Conv2d)] == [(1, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU()], ids=str)
def test_an_antialiased_block_blurs_after_the_activation(activation):
    """The chapter's order in the branch, and before the convolution in the shortcut; the aliased block's checkpoint fits."""
    x = torch.randn(2, 4, 9, 8)
    block = ResidualBlock(4, 6, stride=2, activation=activation, antialias=True).eval()
    block.load_state_dict(ResidualBlock(4, 6, stride=2, activation=activation).state_dict(), strict=True)
    parts, blur = block.branch, regfast.BlurPool2d(3, 2)
    assert parts.conv1.stride == (1, 1)
    f = parts.norm2(parts.conv2(blur(activation(parts.norm1(parts.conv1(x))))))
    torch.testing.assert_close(parts(x), f, **ROUNDING)
    convolved = F.conv2d(blur(x), block.shortcut[0].weight)
    torch.testing.assert_close(block.shortcut(x), block.shortcut[1](convolved), **ROUNDING)


@blocks
def test_blocks_copy_pickle_and_take_factory_arguments(make, shape, output):
    block, x = make().eval(), torch.randn(shape)
    block.alpha.data.fill_(0.5)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert repr(copied) == repr(block) and torch.equal(copied(x), block(x))
    assert block.alpha.shape == (1,) and "alpha" in block.state_dict()
    assert "alpha" not in make(ReZero=False).state_dict()
    made = make(device="meta", dtype=torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16} and {p.device.type for p in made.parameters()} == {"meta"}


@blocks
@pytest.mark.parametrize("ReZero", [True, False])
def test_blocks_compile_export_and_trace(make, shape, output, ReZero):
    torch._dynamo.reset()
    block, x = make(ReZero=ReZero).eval(), torch.randn(shape)
    if ReZero:
        block.alpha.data.fill_(0.5)
    exported = torch.export.export(block, (x,)).module()
    for traced in (torch.compile(block, fullgraph=True, backend="aot_eager"), exported, torch.fx.symbolic_trace(block)):
        torch.testing.assert_close(traced(x), block(x), **ROUNDING)


def test_memory_format_is_kept():
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    block = ResidualBlock(4, 8, stride=2, antialias=True).to(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_any_module_is_a_branch():
    branch, shortcut, x = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(3, 4)
    layer = ReZero(branch, shortcut, F.elu)
    layer.alpha.data.fill_(0.5)
    torch.testing.assert_close(layer(x), shortcut(x) + 0.5 * F.elu(branch(x)), **ROUNDING)
    attention = ReZero(nn.Bilinear(4, 4, 4))
    assert torch.equal(attention(x, x), x)


@pytest.mark.parametrize(
    "activation,fused",
    [
        ("relu", True), (None, True), (nn.ReLU(inplace=True), True), (nn.Identity(), True), (nn.GELU(), True), (nn.SiLU(), True),
        (nn.LeakyReLU(), True), (F.relu, True), (torch.relu, True), (F.gelu, True), (nn.GELU(approximate="tanh"), False),
        (nn.LeakyReLU(0.2), False), (nn.PReLU(), False), (torch.tanh, False), (nn.Tanh(), False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", ["gate", "post"])
def test_an_activation_is_fused_where_it_is_one_of_the_operation_s(activation, fused, form, monkeypatch):
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


def test_a_hook_on_an_activation_is_called():
    activation, called = nn.ReLU(), []
    activation.register_forward_hook(lambda *_: called.append(True))
    ReZero(nn.Linear(4, 4), activation=activation)(torch.randn(3, 4))
    assert called


def test_surgery_on_an_activation_is_obeyed():
    layer, x = ReZero(nn.Linear(4, 4), activation=nn.ReLU()), torch.randn(3, 4)
    layer.alpha.data.fill_(1.0)
    layer.activation = nn.Tanh()
    torch.testing.assert_close(layer(x), x + torch.tanh(layer.branch(x)), **ROUNDING)


MASKS = {
    "none": {},
    "causal": dict(mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True),
    "bool": dict(mask=torch.ones(5, 5).triu(1).bool()),
    "padding": dict(src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2])),
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_transformer_layer_works_in_torch_s_encoder(masks, batch_first, training):
    """As a sum of its sublayers; and at first the whole encoder gives its input back."""
    layer = ReZeroTransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train(training)
    x = torch.randn((2, 5, 8) if batch_first else (5, 2, 8))
    assert torch.equal(encoder(x, **masks), x)
    for own in encoder.layers:
        own.alpha.data.fill_(0.5)
    expected = x
    for own in encoder.layers:
        attention = dict(attn_mask=masks.get("mask"), key_padding_mask=masks.get("src_key_padding_mask"), need_weights=False)
        expected = expected + 0.5 * own.self_attn(expected, expected, expected, **attention)[0]
        expected = expected + 0.5 * own.linear2(F.gelu(own.linear1(expected)))
    torch.testing.assert_close(encoder(x, **masks), expected, **ROUNDING)


def test_the_transformer_layer_is_ready_for_use_as_it_is():
    """torch's encoder says that its nested tensors are not for this layer, and works; dtype, copies and dropout."""
    layer = ReZeroTransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64, bias=False)
    assert all(p.dtype == torch.float64 for p in layer.parameters()) and layer.linear1.bias is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(encoder(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)), x)
    layer.alpha.data.fill_(0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), pickle.loads(pickle.dumps(layer))(x))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_gates_have_an_optimizer_group_of_their_own():
    """Without weight decay, with a learning rate of its own; every trainable parameter is in one group, once."""
    shared = ResidualLinear(4, 4)
    frozen = ResidualBlock(2, 2)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    model = nn.ModuleList([shared, shared, frozen, ResidualLinear(4, 4, ReZero=False), ReZeroTransformerEncoderLayer(8, 2, 16)])
    others, gates = regfast.parameter_groups(model, alpha_lr=0.5)
    assert [id(p) for p in gates["params"]] == [id(shared.alpha), id(model[4].alpha)]
    assert {id(p) for p in others["params"] + gates["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(others["params"]) == len({id(p) for p in others["params"]})
    optimizer = torch.optim.AdamW(regfast.parameter_groups(model, alpha_lr=0.5), lr=0.1, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3), (0.5, 0.0)]
    assert "lr" not in regfast.parameter_groups(model)[1]


def test_bad_arguments():
    for call, error, words in [
        (lambda: ResidualBlock(4, 4, 2), ValueError, ["kernel_size", "odd", "2"]),
        (lambda: ResidualBlock(4, 4, stride=0), ValueError, ["stride", "0"]),
        (lambda: ResidualBlock(4, 4, activation="elu"), ValueError, ["activation", "'elu'", "'relu'"]),
        (lambda: ResidualBlock(4, 4, activation=F.relu), TypeError, ["activation", "module"]),
        (lambda: ResidualBlock(4, 4, ReZero=1), TypeError, ["ReZero", "1", "True or False"]),
        (lambda: BottleneckBlock(4, 4, expansion=0), ValueError, ["expansion", "0", "at least 1"]),
        (lambda: ReZero(F.relu), TypeError, ["branch", "module", "function"]),
        (lambda: ReZero(nn.Identity(), F.relu), TypeError, ["shortcut", "module", "function"]),
        (lambda: ReZero(nn.Identity(), activation=3), TypeError, ["activation", "3"]),
        (lambda: ReZero(nn.Identity(), form="pre"), ValueError, ["form", "'pre'", "'gate'"]),
        (lambda: ReZeroTransformerEncoderLayer(8, 2, activation="elu"), ValueError, ["activation", "'elu'"]),
        (lambda: regfast.parameter_groups(nn.Linear(2, 2)), ValueError, ["gate", "none"]),
        (lambda: regfast.parameter_groups(ResidualLinear(2, 2), alpha_lr=-1), ValueError, ["alpha_lr", "-1"]),
        (lambda: regfast.parameter_groups([]), TypeError, ["model", "list"]),
    ]:  # fmt: skip
        with pytest.raises(error) as raised:
            call()
        assert all(word in str(raised.value) for word in words), str(raised.value)


def train(network: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float) -> list[float]:
    """The losses before each step of Adam."""
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=lr), []
    for _ in range(steps):
        loss = F.cross_entropy(network(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def rows(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that a linear map cannot tell apart: classes by the signs of two numbers."""
    x = torch.randn(128, 16)
    return x, (x[:, 0] * x[:, 1] > 0).long() * 2 + (x[:, 2] * x[:, 3] > 0).long()


def test_a_thousand_linear_layers_train_from_the_first_step():
    """A chain of as many gives the same logits for every input, and residual blocks without a gate blow up."""
    (x, y), depth = rows(), 500
    deep = nn.Sequential(*(ResidualLinear(16, 16) for _ in range(depth)), nn.Linear(16, 4))
    losses = train(deep, x, y, 12, 3e-3)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0] - 0.2, losses
    assert all(later < earlier + 0.02 for earlier, later in itertools.pairwise(losses))
    chain = nn.Sequential(*(layer for _ in range(2 * depth) for layer in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 4))
    assert chain(x).std(0).max() < 1e-6
    torch.autograd.backward(F.cross_entropy(chain(x), y))
    assert chain[0].weight.grad.abs().max() < 1e-12
    ungated = nn.Sequential(*(ResidualLinear(16, 16, ReZero=False) for _ in range(depth)), nn.Linear(16, 4))
    for layer in ungated.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    assert not F.cross_entropy(ungated(x), y).item() < 1e6


def test_a_convolutional_network_of_56_layers_trains_from_the_first_step():
    """Without normalisation: 27 blocks of two, a stem and a head. The plain chain of them stands still."""
    x = torch.randn(64, 3, 12, 12)
    y = (x[:, 0, :6].mean((1, 2)) > x[:, 0, 6:].mean((1, 2))).long()

    def network(blocks: list[nn.Module]) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(16, 2))

    gated = train(network([ResidualBlock(8, 8, norm_layer=None) for _ in range(27)]), x, y, 30, 5e-3)
    chain = train(network([layer for _ in range(54) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]), x, y, 30, 5e-3)
    assert gated[-1] < 0.6 * gated[0], gated
    assert chain[-1] > 0.9 * math.log(2), chain
