"""The operations in float64 by SciPy and NumPy, independent of the library.

A pooling's arrays are (N, C, *spatial) without NaN. Arguments are one integer or one entry per
axis. The output's size is PyTorch's own.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage, special

_BORDER = {"partial": "edge", "replicate": "edge", "reflect": "reflect", "zeros": "constant"}


def per_axis(value, rank):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def max_pool_outputs(sizes, kernel_size, stride, padding, dilation, ceil_mode):
    """The output sizes of nn.MaxPool1d/2d/3d, or None where it refuses the arguments."""
    pool = (torch.nn.MaxPool1d, torch.nn.MaxPool2d, torch.nn.MaxPool3d)[len(sizes) - 1]
    try:
        y = pool(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)(
            torch.empty(1, 1, *sizes, device="meta")
        )
    except RuntimeError:
        return None
    return tuple(y.shape[2:])


def max_blur_pool(
    x,
    kernel_size,
    stride,
    padding,
    dilation,
    ceil_mode,
    taps_per_axis,
    padding_mode,
    rectified=False,
    outputs=None,
):
    """Max pooling at stride 1, then the border, the correlation and the stride.

    The map holds every maximum that a window touching the image has, at least zero if `rectified`.
    """
    rank = x.ndim - 2
    k, s, p, d = (per_axis(value, rank) for value in (kernel_size, stride, padding, dilation))
    if outputs is None:
        outputs = max_pool_outputs(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    holes = [hole * (size - 1) for size, hole in zip(k, d)]
    footprint = np.zeros([1, 1, *(h + 1 for h in holes)], bool)
    footprint[(..., *(slice(None, None, hole) for hole in d))] = True
    # An origin of minus half the size makes element c the first of its own window.
    origin = [-(n // 2) for n in footprint.shape]
    x = np.pad(x, [(0, 0), (0, 0), *((h, 0) for h in holes)], constant_values=-np.inf)
    maxima = ndimage.maximum_filter(
        x, footprint=footprint, mode="constant", cval=-np.inf, origin=origin
    )
    maxima = np.maximum(maxima, 0) if rectified else maxima
    zeros_at = []
    for axis, hole in enumerate(holes, start=2):
        zero = hole - p[axis - 2]
        if padding_mode != "partial":
            positions = max(x.shape[axis] - hole + 2 * p[axis - 2] - hole, 1)
            maxima = maxima.take(range(zero, zero + positions), axis)
            zero = 0
        zeros_at.append(zero)
    leads = [(len(taps) - 1) // 2 for taps in taps_per_axis]
    return _correlate(maxima, zeros_at, leads, s, taps_per_axis, padding_mode, outputs)


def blur_pool(x, stride, padding, taps_per_axis, padding_mode):
    """x extended by `padding` per side ("same": half the taps), then correlated at the stride."""
    rank = x.ndim - 2
    s = per_axis(stride, rank)
    if padding == "same":
        leads, total = (
            [(len(taps) - 1) // 2 for taps in taps_per_axis],
            [len(taps) - 1 for taps in taps_per_axis],
        )
    else:
        leads, total = per_axis(padding, rank), [2 * p for p in per_axis(padding, rank)]
    outputs = [
        (n + t - len(taps)) // step + 1
        for n, t, taps, step in zip(x.shape[2:], total, taps_per_axis, s)
    ]
    return _correlate(x, [0] * rank, leads, s, taps_per_axis, padding_mode, outputs)


def mixup(x, index, lam, boxes, mean, std):
    """Per sample: blended or, where a box is given, pasted; then normalised over dimension 1."""
    y = np.empty_like(x)
    for i, (j, weight, box) in enumerate(zip(index, lam, boxes)):
        if box is None or box[0] < 0:
            y[i] = weight * x[i] + (1 - weight) * x[j]
        else:
            y0, y1, x0, x1 = box
            y[i] = x[i]
            y[i][..., y0:y1, x0:x1] = x[j][..., y0:y1, x0:x1]
    mean, std = (np.reshape(value, (-1, *(1,) * (x.ndim - 2))) for value in (mean, std))
    return (y - mean) / std if x.ndim > 1 else y


def mixup_cross_entropy(x, a, b, lam, weight, ignore_index, reduction, label_smoothing):
    """Row by row; each term's mean is divided by its own sum of weights."""
    log_p, weight = special.log_softmax(x, axis=1), np.asarray(weight)
    shares = np.broadcast_to(np.reshape(lam, (-1, *(1,) * (x.ndim - 2))), a.shape)
    total = 0.0
    for labels, share in ((a, shares), (b, 1 - shares)):
        losses, weights = np.zeros(a.shape), np.zeros(a.shape)
        for place in np.ndindex(a.shape):
            if labels[place] != ignore_index:
                row = log_p[(place[0], slice(None), *place[1:])]
                weights[place] = weight[labels[place]]
                smooth = label_smoothing / len(row) * (weight * row).sum()
                losses[place] = (
                    -(1 - label_smoothing) * weights[place] * row[labels[place]] - smooth
                )
        losses = share * losses
        total = (
            total
            + {"mean": losses.sum() / weights.sum(), "sum": losses.sum(), "none": losses}[reduction]
        )
    return np.asarray(total)


def rezero(x, f, alpha, activation, form):
    act = {
        "identity": lambda u: u,
        "relu": lambda u: np.maximum(u, 0),
        "leaky_relu": lambda u: np.where(u > 0, u, 0.01 * u),
        "gelu": lambda u: u * special.ndtr(u),
        "silu": lambda u: u * special.expit(u),
    }[activation]
    # alpha is a float32.
    alpha = np.float64(np.float32(alpha))
    return x + alpha * act(f) if form == "gate" else act(x + alpha * f)


def _correlate(maxima, zeros_at, leads, strides, taps_per_axis, padding_mode, outputs):
    """Correlate each axis from `lead` positions before its zero, at its stride."""
    for axis, taps in enumerate(taps_per_axis, start=2):
        lead, stride, count = leads[axis - 2], strides[axis - 2], outputs[axis - 2]
        wide = lead + len(taps) + stride
        maxima = np.pad(
            maxima,
            [(wide, wide) if a == axis else (0, 0) for a in range(maxima.ndim)],
            _BORDER[padding_mode],
        )
        first = wide + zeros_at[axis - 2] - lead
        blurred = ndimage.correlate1d(
            maxima, np.asarray(taps), axis, mode="constant", origin=-(len(taps) // 2)
        )
        maxima = blurred.take(range(first, first + stride * count, stride), axis)
    return maxima
