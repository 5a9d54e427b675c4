"""Anti-alias an existing model in one line, and restore it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from ._core.checks import check_bool, per_axis
from ._core.geometry import RATIO, BlurPaddingMode, decimating_window
from ._core.surgery import Report, ReportRow, become, check_model, mark_of, replace, undo
from ._core.taps import without_tensors
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
    """Anti-alias, in place, the layers of a model that decimate.

    These are nn.MaxPool, nn.AvgPool, nn.Conv1d and nn.Conv2d with a stride. A module becomes its
    anti-aliased twin. It stays the same object, with its name, parameters, state_dict keys, hooks,
    dtype, device, memory format and flags, in every place that uses it. If a convolution in an
    nn.Sequential is followed by an activation, with or without a normalisation between them, the
    blur comes after the activation and takes its place. Otherwise the blur comes right after the
    convolution. A stride that is set after the conversion takes effect, as in nn.Conv2d. Layers
    that are already blurred stay as they are: see `regfast.fuse`. `antialias_report` lists what
    became of each layer and why. `restore` undoes the conversion. A second conversion changes
    nothing.

    A normalisation is one of torch.nn, timm or torchvision, or a module with the attribute
    `is_normalisation = True`. It must take images of any size.

    Args:
        model: a module, which may itself be a pooling layer. It must not be compiled, scripted or
            wrapped for several processes.
        max_pool, conv, avg_pool: whether to convert layers of this kind.
        blur: "after" a convolution; or "before" it, at a quarter of the arithmetic with stride 2.
        min_channels: leave convolutions with fewer input channels alone, such as an image's.
        skip: names of modules (patterns with * as well) or types of modules. These modules and
            all modules in them stay as they are.
        blur_size: the number of a blur's taps, on the axes with a stride over 1; if None,
            int(1.7 * stride).
        filter: a blur's taps, by name or as 1-d numbers, as in `regfast.MaxPool2dAA`.
        padding_mode: what a blur reads beyond the border: "reflect", "replicate" or "zeros". If
            None, "partial" for a max pooling and "reflect" for other layers.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: if an argument is not allowed, or the model must be converted
            earlier. The message names the argument and the remedy. The model is then unchanged.

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
    # Plan everything before the first change.
    for _, step in list(plan(model, options)):
        if step is not None:
            _convert(step)
    model.__dict__[OPTIONS] = options
    return model


def antialias_report(model: nn.Module) -> Report:
    """List what `antialias` and `fuse` did to a model; before them, what they would do.

    Returns:
        A list of (name, type, done, why), one row per layer that decimates. It prints as a table.
    """
    check_model(model)
    options = model.__dict__.get(OPTIONS)
    if options is not None:
        reason = "it was added after the conversion: convert the model again"
    elif FUSED in model.__dict__:
        reason = "call regfast.antialias to convert it"
    else:
        return Report(row for row, _ in plan(model, Options()))
    late = dict(done="left", why=reason)
    rows = plan(model, options or Options())
    return Report(row if step is None else row._replace(**late) for row, step in rows)


def restore(model: nn.Module) -> nn.Module:
    """Undo `antialias` and `fuse`, in place, and return the model.

    Layers get back their former classes and keep their current parameters. Layers of regfast that
    were in the model before stay.

    Raises:
        ValueError: if a layer's class has changed since, or if the model is a single convolution
            with its blur in another layer.
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
    """Return the size and the filter of all blurs, checked on a blur of stride 2."""
    size = None if blur_size is None else per_axis("blur_size", blur_size, 1, 1)[0]
    filter = without_tensors(filter)
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
