"""ReZero: residual connections with branches scaled by a learnable gate that starts at zero."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._core.checks import Traceable, check_bool, per_axis
from ._core.geometry import RATIO, Size, decimating_window
from ._core.surgery import is_hooked
from .convolution import Conv2dAA, blur_layers
from .ops.rezero import check_activation, check_form, rezero

__all__ = [
    "BottleneckBlock",
    "ReZero",
    "ReZeroTransformerEncoderLayer",
    "ResidualBlock",
    "ResidualLinear",
    "parameter_groups",
]

Activation = str | nn.Module | Callable[[Tensor], Tensor] | None

_MODULES: dict[str, type[nn.Module]] = {
    "identity": nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU, "silu": nn.SiLU,
}  # fmt: skip
_NAMES = {module: name for name, module in _MODULES.items()}
_FUNCTIONS: list[tuple[Any, str]] = [
    (F.relu, "relu"), (torch.relu, "relu"), (F.leaky_relu, "leaky_relu"),
    (F.gelu, "gelu"), (F.silu, "silu"),
]  # fmt: skip
# The book's default. Each block makes its own ReLU in its place, so that a hook sees one block.
_RELU = nn.ReLU()


def _fused_name(activation: Activation) -> str | None:
    """Return the name of an activation that the operation fuses; None if it must be called."""
    if activation is None or isinstance(activation, str):
        return activation or "identity"
    if not isinstance(activation, nn.Module):
        # Compare by identity, because a callable need not be hashable.
        return next((name for function, name in _FUNCTIONS if function is activation), None)
    other = (
        getattr(activation, "approximate", "none") != "none"
        or getattr(activation, "negative_slope", 0.01) != 0.01
    )
    return None if is_hooked(activation) or other else _NAMES.get(type(activation))


def _check_activation(activation: Any) -> None:
    if isinstance(activation, str):
        check_activation(activation)
    elif not callable(activation) or isinstance(activation, type):
        raise TypeError(f"activation must be a name, a module or a function, got {activation!r}")


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")


class _Gated(Traceable):
    """The shared part of the modules: the gate, and the sum of a branch and its shortcut.

    Without a gate the branch is not scaled.
    """

    alpha: nn.Parameter | None

    def _make_gate(self, gated: bool, device: Any, dtype: Any) -> None:
        # fully_shard refuses 0-d parameters, so the gate has one dimension.
        self.register_parameter(
            "alpha", nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if gated else None
        )

    def _join(
        self, shortcut: Tensor, f: Tensor, activation: Activation = None, form: str = "gate"
    ) -> Tensor:
        alpha = 1.0 if self.alpha is None else self.alpha
        name = _fused_name(activation)
        if name is not None:
            return rezero(shortcut, f, alpha, name, form)
        if form == "gate":
            return rezero(shortcut, activation(f), alpha, "identity")  # type: ignore[operator, misc]
        return activation(rezero(shortcut, f, alpha, "identity"))  # type: ignore[operator, misc]


class _Residual(_Gated):
    """A branch beside a shortcut."""

    def _build(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None,
        activation: Activation,
        form: str,
        gated: bool,
        factory: Any,
    ) -> None:
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = activation
        # Without a gate this is the block of He et al., with the activation after the sum.
        self.form = form if gated else "post"
        self._make_gate(gated, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self._join(self.shortcut(x), self.branch(x), self.activation, self.form)

    def extra_repr(self) -> str:
        activation = (
            "" if isinstance(self.activation, nn.Module) else f", activation={self.activation!r}"
        )
        return f"form={self.form!r}{activation}{'' if self.alpha is not None else ', alpha=None'}"


class ReZero(_Residual):
    """A residual connection with a gate: shortcut(x) + alpha*act(branch(x)).

    alpha is a parameter that starts at zero. At first the layer is its shortcut, whatever the
    branch does, so that networks of any depth train from the first step.

    Args:
        branch: the module with the scaled output. It takes the further arguments of a call, such as
            attention masks.
        shortcut: the module beside it, with an output of the branch's shape; None for x itself.
        activation: "identity", "relu", "leaky_relu", "gelu", "silu", a module or a function. One of
            these names, or its module or function, is computed in the pass that adds. Any other is
            called.
        form: "gate"; or "post" for act(shortcut(x) + alpha*branch(x)).
        device, dtype: of alpha, which has shape (1,).

    Raises:
        ValueError, TypeError: if an argument is not allowed. The message names it and what is
            allowed.

    Source: Bachlechner et al., "ReZero is All You Need" (2020).

    Example:
        >>> layer = regfast.ReZero(nn.Linear(64, 64), activation="relu")
        >>> x = torch.randn(8, 64)
        >>> torch.equal(layer(x), x)
        True
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation = "identity",
        form: str = "gate",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        for name, module in (("branch", branch), ("shortcut", shortcut)):
            if not isinstance(module, nn.Module) and (name == "branch" or module is not None):
                raise TypeError(f"{name} must be a module, got {type(module).__name__}")
        if activation is not None:
            _check_activation(activation)
        check_form(form)
        super().__init__()
        self._build(branch, shortcut, activation, form, True, dict(device=device, dtype=dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._join(
            self.shortcut(x), self.branch(x, *args, **kwargs), self.activation, self.form
        )


def _check_block(
    activation: Any, gated: Any, form: str, antialias: Any = False, norm_layer: Any = None
) -> nn.Module:
    """Return the activation of a block as a module."""
    check_bool("ReZero", gated)
    check_bool("antialias", antialias)
    if norm_layer is not None and not callable(norm_layer):
        raise TypeError(
            f"norm_layer must be a function of a number of channels or None, got {norm_layer!r}"
        )
    check_form(form)
    if activation is _RELU:
        return nn.ReLU()
    if isinstance(activation, str):
        check_activation(activation)
        return _MODULES[activation]()
    if not isinstance(activation, nn.Module):
        raise TypeError(f"activation must be a name or a module, got {activation!r}")
    return activation


def _branch(
    widths: Sequence[int],
    kernel_sizes: Sequence[int],
    strides: Sequence[tuple[int, ...]],
    activation: nn.Module,
    norm_layer: Callable[[int], nn.Module] | None,
    antialias: bool,
    factory: dict[str, Any],
) -> nn.Sequential:
    """Return convolutions with normalisations, and the activation between them.

    `widths` holds the channels before and after each convolution. An anti-aliased stride is a
    blur after the activation.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for place, (k, stride) in enumerate(zip(kernel_sizes, strides), start=1):
        taken, left = ((1, 1), stride) if antialias else (stride, (1, 1))
        arguments: Any = dict(
            stride=taken, padding=(k - 1) // 2, bias=norm_layer is None, **factory
        )
        layers[f"conv{place}"] = nn.Conv2d(widths[place - 1], widths[place], k, **arguments)
        if norm_layer is not None:
            layers[f"norm{place}"] = _normalisation(norm_layer, widths[place], factory)
        if place < len(strides):
            window = decimating_window(2, left, RATIO, None, "binomial", "reflect")
            layers.update(zip((f"act{place}", f"blur{place}"), blur_layers([activation], window)))
    return nn.Sequential(layers)


def _normalisation(
    norm_layer: Callable[[int], nn.Module], channels: int, factory: dict[str, Any]
) -> nn.Module:
    """Return a normalisation; cast it only on request, as FakeTensorMode cannot cast parameters."""
    norm = norm_layer(channels)
    return norm if all(value is None for value in factory.values()) else norm.to(**factory)


def _shortcut(
    in_channels: int,
    channels: int,
    stride: tuple[int, ...],
    norm_layer: Callable[[int], nn.Module] | None,
    antialias: bool,
    factory: Any,
) -> nn.Module | None:
    """Return a 1x1 convolution and a normalisation if the shape changes, otherwise None."""
    if in_channels == channels and stride == (1, 1):
        return None
    convolution: type[nn.Module] = Conv2dAA if antialias else nn.Conv2d
    bias = norm_layer is None
    layers = [convolution(in_channels, channels, 1, stride, bias=bias, **factory)]
    return nn.Sequential(
        *layers, *([] if norm_layer is None else [_normalisation(norm_layer, channels, factory)])
    )


class ResidualBlock(_Residual):
    """The book chapter's residual block, with a gate.

    The branch f is convolution, normalisation, activation, convolution, normalisation. With
    `ReZero` the block is shortcut(x) + alpha*act(f(x)), and alpha is a parameter that starts at
    zero. Without, it is act(shortcut(x) + f(x)).

    Args:
        in_channels, channels: of the input and of the output.
        kernel_size: odd, so that padded convolutions keep the size.
        stride: of the first convolution, and of the shortcut.
        activation: a module, or a name that `regfast.functional.rezero` knows. It also stands
            between the convolutions.
        ReZero: whether there is a gate.
        antialias: whether blurs take the stride in place of the convolutions. One follows the
            activation after the first convolution (a ReLU is folded into its pass), and one
            precedes the shortcut's convolution.
        form: "gate", or "post" for act(shortcut(x) + alpha*f(x)).
        norm_layer: makes a normalisation from the number of channels; None for none, with a bias in
            the convolutions instead.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W) to (N, channels, (H - 1)//stride + 1, (W - 1)//stride + 1). If the
    shape changes, the shortcut is a 1x1 convolution and a normalisation.

    Raises:
        ValueError, TypeError: if an argument is not allowed. The message names it and what is
            allowed.

    Source: the book chapter's ResidualBlock; He et al., "Deep Residual Learning" (2016);
    Bachlechner et al., "ReZero is All You Need" (2020).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        stride: Size = 1,
        activation: str | nn.Module = _RELU,
        ReZero: bool = True,
        *,
        antialias: bool = False,
        form: str = "gate",
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        act, factory = (
            _check_block(activation, ReZero, form, antialias, norm_layer),
            dict(device=device, dtype=dtype),
        )
        _check_sizes(in_channels=in_channels, channels=channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size!r}")
        step, widths = per_axis("stride", stride, 2, 1), (in_channels, channels, channels)
        super().__init__()
        branch = _branch(
            widths, (kernel_size, kernel_size), (step, (1, 1)), act, norm_layer, antialias, factory
        )
        shortcut = _shortcut(in_channels, channels, step, norm_layer, antialias, factory)
        self._build(branch, shortcut, act, form, ReZero, factory)


class BottleneckBlock(_Residual):
    """A residual block of three convolutions, with a gate.

    They are 1x1 to `channels`, 3x3 at the stride, and 1x1 to `channels * expansion`.

    Args:
        in_channels: of the input.
        channels: of the 3x3 convolution.
        expansion: the output's channels are `channels * expansion`.
        stride, activation, ReZero, antialias, form, norm_layer, device, dtype: as in
            `ResidualBlock`.

    Shape: (N, in_channels, H, W) to
    (N, channels * expansion, (H - 1)//stride + 1, (W - 1)//stride + 1).

    Source: He et al., "Deep Residual Learning" (2016), with ResNet v1.5's place of the stride; an
    exercise of the book chapter.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: Size = 1,
        expansion: int = 4,
        activation: str | nn.Module = _RELU,
        ReZero: bool = True,
        *,
        antialias: bool = False,
        form: str = "gate",
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        act, factory = (
            _check_block(activation, ReZero, form, antialias, norm_layer),
            dict(device=device, dtype=dtype),
        )
        _check_sizes(in_channels=in_channels, channels=channels, expansion=expansion)
        step, widths = (
            per_axis("stride", stride, 2, 1),
            (in_channels, channels, channels, channels * expansion),
        )
        super().__init__()
        branch = _branch(
            widths, (1, 3, 1), ((1, 1), step, (1, 1)), act, norm_layer, antialias, factory
        )
        shortcut = _shortcut(in_channels, widths[-1], step, norm_layer, antialias, factory)
        self._build(branch, shortcut, act, form, ReZero, factory)


class ResidualLinear(_Residual):
    """A residual block of two linear layers with an activation between them, and a gate.

    Args:
        in_features, out_features: of the input and of the output. If they differ, the shortcut is a
            linear layer without bias.
        activation, ReZero, form, device, dtype: as in `ResidualBlock`.

    Shape: (..., in_features) to (..., out_features).

    Source: an exercise of the book chapter.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str | nn.Module = _RELU,
        ReZero: bool = True,
        *,
        form: str = "gate",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        act, factory = _check_block(activation, ReZero, form), dict(device=device, dtype=dtype)
        _check_sizes(in_features=in_features, out_features=out_features)
        super().__init__()
        first, second = (nn.Linear(n, out_features, **factory) for n in (in_features, out_features))
        shortcut = (
            None
            if in_features == out_features
            else nn.Linear(in_features, out_features, bias=False, **factory)
        )
        self._build(nn.Sequential(first, act, second), shortcut, act, form, ReZero, factory)


class ReZeroTransformerEncoderLayer(_Gated):
    """A transformer's encoder layer with a gate in place of the normalisations.

    It computes x + alpha*attention(x), then x + alpha*feed_forward(x), with one gate for both.

    It goes into nn.TransformerEncoder with `enable_nested_tensor=False`, as that option supports
    only torch's own layer.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, batch_first, bias, device, dtype: as
            in nn.TransformerEncoderLayer.

    Shape: (S, N, d_model), or with `batch_first` (N, S, d_model), or (S, d_model).

    Source: Bachlechner et al., "ReZero is All You Need" (2020).

    Example:
        >>> layer = regfast.ReZeroTransformerEncoderLayer(64, 4, batch_first=True)
        >>> encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        >>> encoder(torch.randn(8, 10, 64)).shape
        torch.Size([8, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        *,
        batch_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check_activation(activation)
        _check_sizes(d_model=d_model, nhead=nhead, dim_feedforward=dim_feedforward)
        if d_model % nhead:
            raise ValueError(f"nhead must divide d_model, {d_model!r}, got {nhead!r}")
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.self_attn = nn.MultiheadAttention(
            d_model, nhead, dropout, bias=bias, batch_first=batch_first, **factory
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, **factory)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, **factory)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))
        self.activation = _MODULES[activation]() if isinstance(activation, str) else activation
        self._make_gate(True, device, dtype)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Take nn.TransformerEncoderLayer's arguments; `is_causal` needs a mask, as there."""
        masks = dict(attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        attended, _ = self.self_attn(src, src, src, need_weights=False, **masks)
        x = self._join(src, self.dropout1(attended))
        fed = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self._join(x, self.dropout2(fed))


def parameter_groups(model: nn.Module, alpha_lr: float | None = None) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into two groups for an optimizer: gates and all others.

    The gates have no weight decay, which would draw them back to the zero that they start from.
    They often need their own learning rate.

    Args:
        model: a module that has gates of regfast's layers.
        alpha_lr: the gates' learning rate; if None, the optimizer's.

    Returns:
        [{"params": others}, {"params": gates, "weight_decay": 0.0, "lr": alpha_lr}]. Each parameter
        is in one group, once.

    Raises:
        ValueError: if the model has no trainable gate.

    Example:
        >>> groups = regfast.parameter_groups(model, alpha_lr=1e-2)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if alpha_lr is not None and (isinstance(alpha_lr, bool) or not isinstance(alpha_lr, Real)):
        raise TypeError(f"alpha_lr must be a number or None, got {alpha_lr!r}")
    if alpha_lr is not None and not alpha_lr >= 0:
        raise ValueError(f"alpha_lr must be at least 0 or None, got {alpha_lr!r}")
    gates = {module.alpha for module in model.modules() if isinstance(module, _Gated)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alphas = [parameter for parameter in trainable if parameter in gates]
    if not alphas:
        raise ValueError(
            "model must have a trainable gate of a regfast layer, such as ResidualBlock's alpha; "
            "it has none"
        )
    others = [parameter for parameter in trainable if parameter not in gates]
    rate: dict[str, Any] = {} if alpha_lr is None else {"lr": alpha_lr}
    return [{"params": others}, {"params": alphas, "weight_decay": 0.0, **rate}]
