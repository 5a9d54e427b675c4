"""A model that exists, anti-aliased in one line: and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from ._core.checks import check_bool, per_axis
from ._core.geometry import RATIO, BlurPaddingMode, decimating_window
from ._core.surgery import Report, ReportRow, become, check_model, mark_of, replace, undo
from .convolution import FOLLOWER, blur_layers
from .fusion import FUSED
from .plan import OPTIONS, Options, Step, matches, plan, twin_of

__all__ = ["Report", "ReportRow", "antialias", "antialias_report", "restore"]


def antialias(
    model: nn.Module,
    *,
    max_pool: bool = True,
    conv: bool = True,
    avg_pool: bool = True,
    blur: Literal["after", "before"] = "after",
    min_channels: int = 16,
    skip: str | type[nn.Module] | Iterable[str | type[nn.Module]] = (),
    blur_size: int | None = None,
    filter: Any = "binomial",
    padding_mode: BlurPaddingMode | None = None,
) -> nn.Module:
    """Anti-aliases the layers of a model that decimate, in place.

    These are nn.MaxPool, nn.AvgPool, nn.Conv1d and nn.Conv2d with a stride. A module becomes its
    anti-aliased twin: it stays the same object, with its name, parameters, state_dict keys, hooks,
    dtype, device, memory format and flags, in every place where it is used. Where an nn.Sequential
    has a normalisation and an activation after a convolution, the blur comes after the activation,
    whose place it takes; elsewhere, right after the convolution. A stride that is set later is
    obeyed, as nn.Conv2d obeys it. Layers that are blurred already stay as they are: see
    `regfast.fuse`. `antialias_report` says what became of each layer, and why one was left.
    `restore` undoes it. Converting twice is converting once.

    A normalisation is one of torch.nn, timm or torchvision, or a module that says so by the
    attribute `is_normalisation = True`. It must take images of any size.

    Args:
        model: a module; of any kind but wrapped for several processes, compiled or scripted. It may
            itself be a pooling layer.
        max_pool, conv, avg_pool: which layers.
        blur: "after" a convolution; or "before" it, at a quarter of the arithmetic with stride 2.
        min_channels: convolutions of fewer input channels, such as an image's, are left alone.
        skip: names of modules (patterns with * as well), with all that is in them, or types of
            modules.
        blur_size: the number of a blur's taps, on the axes whose stride is over 1; if None,
            int(1.7 * stride).
        filter: a blur's taps, by name or as 1-d numbers, as in `regfast.MaxPool2dAA`.
        padding_mode: what a blur reads beyond the border: "reflect", "replicate" or "zeros". If
            None, "reflect", and of a max pooling "partial".

    Returns:
        The model.

    Raises:
        ValueError, TypeError: for an argument that is not allowed, and for a model that must be
            converted earlier; the message names it and what to do. The model is then untouched.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019).

    Example:
        >>> model = regfast.antialias(torchvision.models.resnet50())
        >>> print(regfast.antialias_report(model))
    """
    check_model(model)
    for name, value in (("max_pool", max_pool), ("conv", conv), ("avg_pool", avg_pool)):
        check_bool(name, value)
    if blur not in ("after", "before"):
        raise ValueError(f"blur must be 'after' or 'before', got {blur!r}")
    (channels,) = per_axis("min_channels", min_channels, 1, 0)
    entries = _check_skip(model, skip)
    size, taps = _check_blur(blur_size, filter, padding_mode)
    options = Options(
        max_pool, conv, avg_pool, blur, channels, entries, size, taps, padding_mode
    )  # fmt: skip
    # All of it is planned before the first change.
    for _, step in list(plan(model, options)):
        if step is not None:
            _convert(step)
    model.__dict__[OPTIONS] = options
    return model


def antialias_report(model: nn.Module) -> Report:
    """What `antialias` and `fuse` did to a model and left alone; before them, what they would do.

    Returns:
        A list of (name, type, done, why), a row for each layer that decimates; printed, a table.
    """
    check_model(model)
    options = model.__dict__.get(OPTIONS)
    if options is not None:
        reason = "it has come since: convert the model again"
    elif FUSED in model.__dict__:
        reason = "see regfast.antialias, which has not seen it"
    else:
        return Report(row for row, _ in plan(model, Options()))
    late = dict(done="left", why=reason)
    rows = plan(model, options or Options())
    return Report(row if step is None else row._replace(**late) for row, step in rows)


def restore(model: nn.Module) -> nn.Module:
    """Undoes `antialias` and `fuse`, in place. Returns the model.

    Layers are again what they were, with the parameters that they have now. Layers of regfast that
    the two did not make stay.

    Raises:
        ValueError: for a layer that has become another since, and for a convolution alone whose
            blur is in another layer.
    """
    check_model(model)
    if mark_of(model) is not None and model.__dict__.get("blur", "after") is None:
        found = f"the blur of model, a {type(model).__name__}, is in another layer"
        raise ValueError(f"{found}: restore the nn.Sequential of both")
    undo(model)
    for module in model.modules():
        module.__dict__.pop(OPTIONS, None)
        module.__dict__.pop(FUSED, None)
    return model


def _check_skip(model: nn.Module, skip: Any) -> tuple[str | type[nn.Module], ...]:
    single = not isinstance(skip, Iterable) or isinstance(skip, (str, type))
    entries = (skip,) if single else tuple(skip)
    for entry in entries:
        is_type = isinstance(entry, type) and issubclass(entry, nn.Module)
        if not isinstance(entry, str) and not is_type:
            raise TypeError(f"skip must be names of modules or types of modules, got {entry!r}")
        if next(matches(model, entry), None) is None:
            raise ValueError(f"skip: no module of the model is {entry!r}")
    return entries


def _check_blur(blur_size: Any, filter: Any, padding_mode: Any) -> tuple[int | None, Any]:
    """The size and the filter of all blurs, checked on one of stride 2."""
    size = None if blur_size is None else per_axis("blur_size", blur_size, 1, 1)[0]
    filter = filter.tolist() if hasattr(filter, "tolist") else filter
    filter = tuple(filter) if isinstance(filter, list) else filter
    mode = "reflect" if padding_mode is None else padding_mode
    decimating_window(1, 2, RATIO, size, filter, mode)
    return size, filter


def _convert(step: Step) -> None:
    module: Any = step.module
    become(module, twin_of(module), step.attributes, step.done, step.why)
    if step.place is not None:
        container, key = step.place
        activation: Any = container._modules[key]
        layers = blur_layers([activation], module._window)
        replace(container, key, layers[0] if len(layers) == 1 else nn.Sequential(*layers))
        module.__dict__[FOLLOWER] = layers[-1]
