"""Operations on DTensors and under fully_shard give the result of the whole tensor.

A DTensor holds a part of the batch or of the channels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Two processes compare the output and all gradients to the plain tensor's, per operation and
# placement.
DRIVER = """
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import regfast
from regfast import functional as F

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
X, LABELS, INDEX = torch.randn(4, 6, 9, 8), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 3, 2])
OPERATIONS = {
    "max_blur_pool": lambda x, a: F.max_blur_pool2d(x, 3, 2, 1),
    "blur_pool": lambda x, a: F.blur_pool2d(x),
    "blur_pool relu": lambda x, a: F.blur_pool2d(x, activation="relu"),
    "rezero": lambda x, a: F.rezero(x, 2 * x, a),
    "mixup": lambda x, a: F.mixup(x, INDEX, 0.25),
    "mixup lam": lambda x, a: F.mixup(x, INDEX, a.view(())),
    "cutmix": lambda x, a: F.mixup(x, INDEX, 0.25, box=(1, 4, 2, 5)),
    "normalised": lambda x, a: F.mixup(x, INDEX, 0.25, mean=[0.5] * 6, std=[2.0] * 6),
    "loss": lambda x, a: F.mixup_cross_entropy(x.flatten(1), (LABELS, LABELS.flip(0), 0.25)),
    "losses": lambda x, a: F.mixup_cross_entropy(
        x.flatten(1), (LABELS, LABELS.flip(0), 0.25), reduction="none"
    ),
}


def derivatives(function, x, alpha):
    x, alpha = x.detach().requires_grad_(), alpha.detach().requires_grad_()
    y = function(x, alpha)
    whole = y.full_tensor() if isinstance(y, DTensor) else y
    torch.manual_seed(1)
    dx, dalpha = torch.autograd.grad(whole, (x, alpha), torch.randn_like(whole), allow_unused=True)
    return y, [whole, *(g.full_tensor() if isinstance(g, DTensor) else g for g in (dx, dalpha))]


for name, function in OPERATIONS.items():
    # (torch flattens the rows, and refuses to shard a dimension in the middle.)
    for placement in (Shard(0), Shard(1), Replicate(), *([] if "loss" in name else [Shard(2)])):
        for gated in (False, True):
            alpha = torch.full((1,), 0.375)
            _, expected = derivatives(function, X, alpha)
            gate = distribute_tensor(alpha, mesh, [Replicate()]) if gated else alpha
            y, found = derivatives(function, distribute_tensor(X, mesh, [placement]), gate)
            assert isinstance(y, DTensor), name
            if "loss" not in name and not (placement == Shard(2) and "pool" in name):
                assert y.placements == (placement,), (name, y.placements)
            for a, b in zip(found, expected):
                assert (a is None) == (b is None), name
                if a is not None:
                    torch.testing.assert_close(
                        a, b, msg=lambda m: f"{name} {placement} {gated}: {m}"
                    )

# An uneven part is gathered, an empty one with it.
uneven = distribute_tensor(X[:3], mesh, [Shard(0)])
torch.testing.assert_close(F.max_blur_pool2d(uneven).full_tensor(), F.max_blur_pool2d(X[:3]))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        regfast.Conv2dAA(6, 8, 3, 2, 1, activation="relu"),
        regfast.MaxPool2dAA(2, activation="relu"),
        regfast.ResidualBlock(8, 8, norm_layer=None), regfast.AvgPool2dAA(2), nn.Flatten(),
        nn.Linear(8, 5),
    )


def train(model, rows):
    optimizer = torch.optim.SGD(regfast.parameter_groups(model), lr=0.1)
    losses = []
    for _ in range(3):
        target = LABELS[rows], LABELS.flip(0)[rows], 0.25
        loss = regfast.MixupCrossEntropyLoss()(model(X[rows]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# fully_shard: each process has half of the batch, and the mean of both is that of the whole.
plain, sharded = network(), network()
fully_shard(sharded[2], mesh=mesh)
fully_shard(sharded, mesh=mesh)
expected = train(plain, slice(None))
found = train(sharded, slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))
dist.all_reduce(found)
torch.testing.assert_close(found / 2, expected)
for (name, a), (_, b) in zip(sharded.named_parameters(), plain.named_parameters()):
    torch.testing.assert_close(a.full_tensor(), b, msg=lambda m: f"{name}: {m}")
print("all of it holds", flush=True)
time.sleep(0.5)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_operations_on_parts_are_those_on_the_whole(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(driver),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.count("all of it holds") == 2, (
        done.stdout + done.stderr
    )


def test_plain_tensors_ask_for_nothing_distributed() -> None:
    """A program without a DTensor does not import torch.distributed.tensor."""
    call = "import sys, torch, regfast; regfast.MaxPool2dAA(2)(torch.randn(1, 1, 4, 4))"
    code = f"{call}; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_dtensor_has_no_out() -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        x = DTensor.from_local(torch.randn(2, 3), init_device_mesh("cpu", (1,)), [Replicate()])
        import regfast

        with pytest.raises(ValueError, match="out must be None for a DTensor"):
            regfast.functional.mixup(x, torch.tensor([1, 0]), 0.5, out=torch.empty(2, 3))
    finally:
        torch.distributed.destroy_process_group()
