"""The windows of networks: reference against oracle, kernels against reference, and their paths."""

from __future__ import annotations

import pytest
import torch
from samples import NETWORK_WINDOWS, OPERATIONS, NetworkWindow, blur_window, pool_window
from test_contract import FLOAT64, check_against_reference, reference

from regfast._core.geometry import Window, as_image

# These have twenty times the programs or the taps of the others.
SLOW = {
    "pvt_v2_b0",
    "s3d 3",
    "nextvit_small by 16",
    *(w.name for w in NETWORK_WINDOWS if w.name.endswith("before")),
}
BY_NAME = {operation.name: operation for operation in OPERATIONS}
every = pytest.mark.parametrize("network", NETWORK_WINDOWS, ids=lambda network: network.name)


def window_of(network: NetworkWindow) -> Window:
    return (pool_window if network.operation == "max_blur_pool" else blur_window)(network.sample)


@every
def test_the_reference_is_what_scipy_and_numpy_compute(network):
    x, operation = network.sample.input(torch.float64), BY_NAME[network.operation]
    expected = torch.from_numpy(operation.oracle(x.numpy(), network.sample))
    torch.testing.assert_close(reference(operation, network.sample, x), expected, **FLOAT64)


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(w, id=w.name, marks=pytest.mark.slow if w.name in SLOW else ())
        for w in NETWORK_WINDOWS
    ],
)
def test_the_kernels_are_the_reference(network, device, kernels, poisoned):
    check_against_reference(
        BY_NAME[network.operation], network.sample, network.sample.input(device=device)
    )


def test_the_windows_are_named_and_here_once():
    assert len({network.name for network in NETWORK_WINDOWS}) == len(NETWORK_WINDOWS)
    assert len({window_of(network) for network in NETWORK_WINDOWS}) == len(NETWORK_WINDOWS)


# Max poolings that read beyond a border: the last output of an odd row in ceil mode, and peers that
# extend the inner map. With "reflect" they read other windows there.
READ_BEYOND = {"googlenet", "kornia.MaxBlurPool2D", "composer resnet50", "composer inception_v4"}
MOVE_WINDOWS = {
    "antialiased_cnns.resnet50",
    "antialiased_cnns.alexnet",
    "antialiased_cnns.densenet121",
    "antialiased_cnns.vgg16 lpf3",
    "antialiased_cnns.vgg16 lpf5",
    "antialiased_cnns.vgg16 lpf2",
    "resnetblur50",
}


def axes_of(network: NetworkWindow) -> list:
    """The axes of every launch. A volume is processed as images, along its slices and across."""
    from regfast.kernels.windows import axis_of

    window, sizes = window_of(network), network.sample.shape[2:]
    if window.rank == 3:
        images = [(as_image(window, 1, 2), sizes[1:]), (as_image(window, 0, None), (sizes[0], 1))]
    else:
        images = [(window, sizes) if window.rank == 2 else (as_image(window, None, 0), (1, *sizes))]
    return [
        axis_of(image, axis, shape[axis], outputs=2) for image, shape in images for axis in (0, 1)
    ]


def test_all_but_a_few_maxima_read_nothing_beyond_a_border():
    """The others take the kernel's plain path: constant weights and clamped positions."""
    pytest.importorskip("triton")
    maxima = {
        network.name: axes_of(network)
        for network in NETWORK_WINDOWS
        if network.operation == "max_blur_pool"
    }
    assert {
        name for name, axes in maxima.items() if any(axis.edge != "none" for axis in axes)
    } == READ_BEYOND | MOVE_WINDOWS
    assert {
        name for name, axes in maxima.items() if any(axis.moves_windows for axis in axes)
    } == MOVE_WINDOWS


def test_no_blur_moves_windows():
    """Borders cost weights per row and per column; borders of zeros cost nothing."""
    pytest.importorskip("triton")
    for network in NETWORK_WINDOWS:
        if network.operation == "blur_pool":
            axes, zeros = axes_of(network), window_of(network).padding_mode == "zeros"
            assert not any(axis.moves_windows for axis in axes)
            assert any(axis.weighs_borders for axis in axes) is not zeros, network.name
